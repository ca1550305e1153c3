"""What a student learns from a teacher, as pure functions on logits, and adapters that keep zeros.

configs.py      settings of every loss; losses.py which function each means
divergences.py  forward and reverse KL, generalised JSD, skew KL
truncated.py    KL over the teacher's top tokens and one bucket for the rest; sampled.py over tokens drawn from it
hidden.py       distance of hidden states through a learned projection
adapters.py     LoRA through peft, masked where the student is sparse, merged in float32
"""

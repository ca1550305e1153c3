"""What a model lost: perplexity, KL and agreement on held-out text, records of them, and the gate that decides."""

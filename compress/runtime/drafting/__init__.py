"""Speculative decoding: a draft proposes tokens, the target computes them in one step and keeps what it would say.

Greedy answers are those of the target alone, token for token; sampled ones follow its distribution exactly.
"""

"""How much a decoder block matters, by two measures that need no labels.

Influence (ShortGPT, Men et al., arXiv:2403.03853): 1 - cos(h, h') of the hidden states before and behind the block, the
mean over tokens. Loss (SLEB, Song et al., arXiv:2402.09025, which asks for the perplexity of the model without the
block): here the divergence KL(p || q) of the model's next-token distributions p from those q without the block.
"""

from __future__ import annotations

import torch
from torch import Tensor


def influence(before: Tensor, behind: Tensor) -> float:
    """The sum of 1 - cos over all tokens of before, behind (..., hidden): 0 where the block only scales its input."""
    cosine = torch.nn.functional.cosine_similarity(before.float(), behind.float(), dim=-1)
    return float((1.0 - cosine).sum(dtype=torch.float64))


def divergence(reference: Tensor, found: Tensor) -> float:
    """The sum of KL(p || q) in nats over all tokens of two logits (..., vocabulary) float32."""
    p, q = torch.log_softmax(reference, dim=-1), torch.log_softmax(found, dim=-1)
    return float((p.exp() * (p - q)).sum(dtype=torch.float64))

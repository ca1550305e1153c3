"""Forward KL from the teacher's most likely tokens alone: what is left of its distribution is one bucket.

The bucket's term makes it a lower bound of the KL (the chain rule with what is inside the bucket left out), and exact
once `k` is the vocabulary. Dropping the rest or renormalising instead teaches overconfidence (Anshumann et al.,
arXiv:2503.16870). It holds at temperature 1 only: a truncated distribution cannot be flattened exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

SMALLEST = 1e-12


def top_k(teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Teacher logits (tokens, vocabulary) -> log-probabilities (tokens, k) and ids (tokens, k) of the most likely."""
    return log_softmax(teacher, -1).topk(min(k, teacher.shape[-1]), -1)


def topk_kl(log_probabilities: Tensor, ids: Tensor, student: Tensor) -> Tensor:
    """KL (tokens,) over the listed tokens and the bucket of all others.

    log_probabilities, ids: (tokens, k), the teacher's, over the whole vocabulary; student: logits (tokens, vocabulary).
    """
    q = log_softmax(student, -1).gather(-1, ids)
    p = log_probabilities
    inside = (p.exp() * (p - q)).sum(-1)
    if ids.shape[-1] == student.shape[-1]:
        return inside
    rest_p = (1.0 - p.exp().sum(-1)).clamp_min(0.0)
    rest_q = (1.0 - q.exp().sum(-1)).clamp_min(SMALLEST)
    return inside + rest_p * (rest_p.clamp_min(SMALLEST).log() - torch.log(rest_q))

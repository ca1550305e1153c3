"""Forward KL from a few tokens drawn from the teacher: an unbiased estimate, gradient and value.

With ids i drawn from p with replacement, the mean of log p(i) - log q(i) has the mean KL(p || q). The likeliest tokens
alone would teach overconfidence (Anshumann et al., arXiv:2503.16870).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax


def draw(teacher: Tensor, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """Teacher logits (tokens, vocabulary) -> log-probabilities and ids (tokens, draws) of what is drawn from it."""
    log_probabilities = log_softmax(teacher, -1)
    generator = torch.Generator().manual_seed(seed % 2**63)
    ids = torch.multinomial(log_probabilities.exp(), draws, replacement=True, generator=generator)
    return log_probabilities.gather(-1, ids), ids


def sampled_kl(log_probabilities: Tensor, ids: Tensor, student: Tensor) -> Tensor:
    """Estimated KL (tokens,) from the teacher's draws; student: logits (tokens, vocabulary)."""
    return (log_probabilities - log_softmax(student, -1).gather(-1, ids)).mean(-1)

"""Divergences between a teacher's and a student's next-token distributions.

All take logits (tokens, vocabulary) in float32, teacher first, and give one value per token (tokens,) in nats. Both
are divided by `temperature` and the result is multiplied by its square, so that gradients keep their size.

Forward KL: Hinton et al., arXiv:1503.02531. Reverse KL: Gu et al., arXiv:2306.08543. Generalised JSD: Agarwal et al.,
arXiv:2306.13649. Skew KL: Ko et al., arXiv:2402.03898.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import log_softmax


def forward_kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student)."""
    p, q = _log_probabilities(teacher, student, temperature)
    return temperature**2 * _kl(p, q)


def reverse_kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher)."""
    p, q = _log_probabilities(teacher, student, temperature)
    return temperature**2 * _kl(q, p)


def jsd(teacher: Tensor, student: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student, 0 < beta < 1."""
    p, q = _log_probabilities(teacher, student, temperature)
    mixture = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return temperature**2 * (beta * _kl(p, mixture) + (1.0 - beta) * _kl(q, mixture))


def skew_kl(teacher: Tensor, student: Tensor, alpha: float, temperature: float = 1.0) -> Tensor:
    """KL(teacher || alpha teacher + (1 - alpha) student), 0 <= alpha < 1; at 0 it is the forward KL."""
    p, q = _log_probabilities(teacher, student, temperature)
    if alpha > 0:
        q = torch.logaddexp(p + math.log(alpha), q + math.log1p(-alpha))
    return temperature**2 * _kl(p, q)


def _log_probabilities(teacher: Tensor, student: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return log_softmax(teacher / temperature, -1), log_softmax(student / temperature, -1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL between distributions given by their logarithms, summed over the last axis."""
    return (p.exp() * (p - q)).sum(-1)

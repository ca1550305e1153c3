"""How far a student's hidden states are from its teacher's, through a projection that learns with the student.

After DistilBERT (Sanh et al., arXiv:1910.01108: cosine) and TinyBERT (Jiao et al., arXiv:1909.10351: mean squared error
through a projection). The projection begins as the ridge regression of one batch, not at random: what it can explain
at once teaches the student nothing wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, linear

from compress.distillation.configs import HiddenConfig

RIDGE = 0.01


def pairs(config: HiddenConfig, student_blocks: int, teacher_blocks: int) -> list[tuple[int, int]]:
    """(student's, teacher's) places in the list of hidden states, of which the first enters the first block."""
    first = student_blocks if config.layers == "last" else 1
    return [(i, round(i * teacher_blocks / student_blocks)) for i in range(first, student_blocks + 1)]


def fitted(student: Tensor, teacher: Tensor) -> Tensor:
    """The projection (teacher width, student width) float32 that explains the states (tokens, width) best."""
    x, y = student.float(), teacher.float()
    moments = x.T @ x
    damped = moments + RIDGE * moments.diagonal().mean() * torch.eye(len(moments))
    return torch.linalg.solve(damped, x.T @ y).T.contiguous()


def distance(
    kind: Literal["cosine", "mse"], student: Sequence[Tensor], teacher: Sequence[Tensor], projections: Sequence[Tensor]
) -> Tensor:
    """Mean over the pairs of each token's distance (tokens,), float32; states are (tokens, width)."""
    total = None
    for own, wanted, projection in zip(student, teacher, projections, strict=True):
        near, goal = linear(own.float(), projection), wanted.float()
        if kind == "cosine":
            far = 1.0 - cosine_similarity(near, goal, dim=-1)
        else:
            far = (near - goal).pow(2).mean(-1) / goal.pow(2).mean().clamp_min(1e-12)
        total = far if total is None else total + far
    assert total is not None
    return total / len(student)

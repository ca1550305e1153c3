"""Which function each loss of a recipe means."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

from compress.distillation.configs import (
    ForwardKlConfig,
    JsdConfig,
    LossConfig,
    ReverseKlConfig,
    SkewKlConfig,
    TopKConfig,
)
from compress.distillation.divergences import forward_kl, jsd, reverse_kl, skew_kl
from compress.distillation.truncated import top_k, topk_kl


def shared_vocabulary(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """Both logits over the ids that both have; rows beyond the shorter vocabulary are padding that no token means."""
    width = min(teacher.shape[-1], student.shape[-1])
    return teacher[..., :width], student[..., :width]


def loss(config: LossConfig, student: Tensor, teacher: Tensor | None, targets: Tensor) -> Tensor:
    """The loss of every token (tokens,) in nats.

    Args:
        student, teacher: logits (tokens, vocabulary) float32; the teacher's may be None where `config.taught` is False.
        targets: (tokens,) int64, the next token of the text.
    """
    if teacher is None:
        assert not config.taught
        return cross_entropy(student, targets, reduction="none")
    teacher, student = shared_vocabulary(teacher, student)
    if isinstance(config, ForwardKlConfig):
        return forward_kl(teacher, student, config.temperature)
    if isinstance(config, ReverseKlConfig):
        return reverse_kl(teacher, student, config.temperature)
    if isinstance(config, JsdConfig):
        return jsd(teacher, student, config.beta, config.temperature)
    if isinstance(config, SkewKlConfig):
        return skew_kl(teacher, student, config.alpha, config.temperature)
    if isinstance(config, TopKConfig):
        return topk_kl(*top_k(teacher, config.k), student)
    return cross_entropy(student, targets, reduction="none")

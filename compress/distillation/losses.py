"""Which function each loss of a recipe means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from compress.distillation.configs import (
    ForwardKlConfig,
    HiddenConfig,
    JsdConfig,
    LossConfig,
    ReverseKlConfig,
    SampledKlConfig,
    SkewKlConfig,
    TopKConfig,
)
from compress.distillation.divergences import forward_kl, jsd, reverse_kl, skew_kl
from compress.distillation.sampled import draw, sampled_kl
from compress.distillation.truncated import top_k, topk_kl

DIVERGENCES: dict[type[Any], Callable[[Any, Tensor, Tensor], Tensor]] = {
    ForwardKlConfig: lambda config, teacher, student: forward_kl(teacher, student, config.temperature),
    HiddenConfig: lambda config, teacher, student: forward_kl(teacher, student, config.temperature),
    ReverseKlConfig: lambda config, teacher, student: reverse_kl(teacher, student, config.temperature),
    JsdConfig: lambda config, teacher, student: jsd(teacher, student, config.beta, config.temperature),
    SkewKlConfig: lambda config, teacher, student: skew_kl(teacher, student, config.alpha, config.temperature),
}
"""Of losses that look at all of the teacher's logits; of `hidden`, the part that does."""


def shared_vocabulary(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """Both logits over the ids that both have; rows beyond the shorter vocabulary are padding that no token means."""
    width = min(teacher.shape[-1], student.shape[-1])
    return teacher[..., :width], student[..., :width]


def loss(config: LossConfig, student: Tensor, teacher: Tensor | None, targets: Tensor, seed: int = 0) -> Tensor:
    """The loss of every token (tokens,) in nats.

    Args:
        student, teacher: logits (tokens, vocabulary) float32; the teacher's may be None where `config.taught` is False.
        targets: (tokens,) int64, the next token of the text.
        seed: of what is drawn.
    """
    if teacher is None:
        assert not config.taught
        return cross_entropy(student, targets, reduction="none")
    teacher, student = shared_vocabulary(teacher, student)
    if config.cached:
        return kept_loss(config, *kept(config, teacher, seed), student)
    divergence = DIVERGENCES.get(type(config))
    return (
        cross_entropy(student, targets, reduction="none")
        if divergence is None
        else divergence(config, teacher, student)
    )


def kept(config: LossConfig, teacher: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """What a loss with `cached` looks at: log-probabilities and ids, (tokens, `kept_width(config)`) each."""
    if isinstance(config, TopKConfig):
        return top_k(teacher, config.k)
    assert isinstance(config, SampledKlConfig)
    return draw(teacher, config.draws, seed)


def kept_loss(config: LossConfig, log_probabilities: Tensor, ids: Tensor, student: Tensor) -> Tensor:
    """The loss of every token (tokens,) from what was `kept`."""
    function = topk_kl if isinstance(config, TopKConfig) else sampled_kl
    return function(log_probabilities, ids, student)


def kept_width(config: LossConfig) -> int:
    """Tokens of the teacher at every place that a loss with `cached` looks at."""
    assert isinstance(config, TopKConfig | SampledKlConfig)
    return config.k if isinstance(config, TopKConfig) else config.draws

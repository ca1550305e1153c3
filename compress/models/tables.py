"""The two matrices with a row per token: the embedding, and the head, which may be the same one."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from compress.models.skeleton import OUTSIDE, LinearSpec, Skeleton

_NUMBERED = re.compile(r"\.\d+\.")


class _ReachedError(Exception):
    """Ends a forward where no more of it is needed."""


def tables(skeleton: Skeleton) -> list[LinearSpec]:
    """The embedding, and the head where it has a weight of its own: (vocabulary, width) each."""
    weights = [skeleton.embedding] if is_tied(skeleton) else [skeleton.embedding, skeleton.head_weight]
    found = []
    for weight in weights:
        rows, width = skeleton.checkpoint.index[weight].shape
        found.append(LinearSpec(weight.removesuffix(".weight"), OUTSIDE, width, rows, "linear", None, weight))
    return found


def in_block(linear: str) -> bool:
    """Whether a linear, by its name on disk, is in a block, and so neither of the tables."""
    return _NUMBERED.search(linear) is not None


def is_tied(skeleton: Skeleton) -> bool:
    """Whether the head multiplies with the embedding."""
    return skeleton.tied().get(skeleton.head_weight, skeleton.head_weight) == skeleton.embedding


def aliases(skeleton: Skeleton) -> list[str]:
    """Stored tensors that repeat the embedding."""
    return sorted(name for name in skeleton.stored_copies() if skeleton.tied()[name] == skeleton.embedding)


@torch.no_grad()
def entering_head(skeleton: Skeleton, hidden: Tensor) -> Tensor:
    """The last block's output (batch, seq, hidden) -> what the head multiplies, (batch, seq, width)."""
    found: list[Tensor] = []

    def stop(module: nn.Module, given: tuple[Tensor]) -> None:
        found.append(given[0])
        raise _ReachedError

    hook = skeleton.output_projection.register_forward_pre_hook(stop)
    try:
        skeleton.differentiable_head(hidden)
    except _ReachedError:
        return found[0]
    finally:
        hook.remove()
    raise AssertionError("the head was not reached")

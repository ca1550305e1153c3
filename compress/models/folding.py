"""Moving a per-channel scale along an Edge: the block computes the same, its weights are distributed differently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compress.models.families import Edge
from compress.models.graph import weight_of


@torch.no_grad()
def fold_scale(edge: Edge, modules: Mapping[str, nn.Module], scale: torch.Tensor) -> None:
    """Divides the producer's channels by `scale` (channels,), positive, and multiplies the consumers' inputs by it.

    `modules` are the live modules by checkpoint name (`Skeleton.modules`), changed in place. Arithmetic is float64,
    rounded once into each weight's own dtype.
    """
    factor = scale.double()
    producer = modules[edge.producer]
    rows = slice(*edge.rows) if edge.rows is not None else slice(None)
    if edge.kind == "norm":
        weight, shift = weight_of(producer), 1.0 if edge.offset else 0.0
        weight.copy_((weight.double() + shift) / factor - shift)
    else:
        weight = _as_linear(producer)[rows]
        weight.copy_(weight.double() / factor[:, None])
    if edge.has_bias:
        bias = cast(torch.Tensor, producer.bias)[rows]
        bias.copy_(bias.double() / factor)
    for name in edge.consumers:
        weight = _as_linear(modules[name])
        weight.copy_(weight.double() * factor)


def _as_linear(module: nn.Module) -> torch.Tensor:
    """The weight as a view (out, in)."""
    weight = weight_of(module)
    return weight.T if isinstance(module, Conv1D) else weight

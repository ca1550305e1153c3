"""What a width cut leaves of every tensor: the lengths of its axes, and which rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.models.skeleton import Skeleton
from compress.pipeline.cut_job import Cut
from compress.pipeline.width_layout import LAYOUTS, Axis, Layout


@dataclass(frozen=True, slots=True)
class WidthCut(Cut):
    """neurons of all_neurons stay, and hidden of all_hidden channels of the stream between the blocks; of each of
    kv_heads groups of all_heads query heads, of head_dim each, heads stay.

    kv_heads: fewer than all_kv_heads only where every query head has keys of its own, which go with it.
    parameters: what the whole model then has, of all_parameters; embeddings counted, tied copies not.

    Of a mixture, neurons are those of every routed expert; experts for all tokens have `shared` times as many, and its
    dense blocks keep `dense` of all_dense. Latent attention has queries of query_dim, and keys and values of value_dim
    together for each head.
    """

    neurons: int
    all_neurons: int
    heads: int
    all_heads: int
    kv_heads: int
    all_kv_heads: int
    head_dim: int
    hidden: int
    all_hidden: int
    parameters: int
    all_parameters: int
    dense: int = 0
    all_dense: int = 0
    shared: int = 0
    query_dim: int = 0
    value_dim: int = 0

    @property
    def narrows(self) -> bool:
        """Whether channels of the stream go."""
        return self.hidden < self.all_hidden

    @property
    def sections(self) -> tuple[int, int]:
        """Of how many equal runs of query heads how many of each stay."""
        return (1, self.kv_heads) if self.kv_heads < self.all_kv_heads else (self.kv_heads, self.heads)

    def size(self, axis: Axis) -> int:
        """How long an axis is then."""
        keys, queries = self.kv_heads * self.head_dim, self.heads * self.kv_heads * self.head_dim
        sizes: dict[Axis, int] = {
            "hidden": self.hidden,
            "neurons": self.neurons,
            "gate_up": 2 * self.neurons,
            "dense": self.dense,
            "shared": self.shared * self.neurons,
            "heads": queries,
            "kv": keys,
            "qkv": queries + 2 * keys,
            "mla_q": self.kv_heads * self.query_dim,
            "mla_kv": self.kv_heads * self.value_dim,
        }
        return sizes[axis]

    def rows(self, axis: Axis, kept: Tensor) -> Tensor:
        """The rows (rows,) of an axis that feed what stays of neurons or of heads, `kept` (kept,) int64 sorted."""
        if axis == "gate_up":
            return torch.cat([kept, kept + self.all_neurons])
        if axis in ("neurons", "dense", "shared", "heads"):
            return kept
        if axis in ("mla_q", "mla_kv"):
            size = self.query_dim if axis == "mla_q" else self.value_dim
            heads = kept[:: self.head_dim] // self.head_dim
            return (heads.unsqueeze(1) * size + torch.arange(size)).reshape(-1)
        all_keys = self.all_kv_heads * self.head_dim
        keys = kept if self.kv_heads < self.all_kv_heads else torch.arange(all_keys)
        if axis == "kv":
            return keys
        queries = self.all_heads * all_keys
        return torch.cat([kept, queries + keys, queries + all_keys + keys])

    def shape(self, layout: Layout, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a tensor of the checkpoint then, from the one that it has."""
        axes = layout.axes_of(name) or ()
        axes += (None,) * (len(shape) - len(axes))
        if layout.turned and len(shape) == 2:
            axes = axes[::-1]
        return tuple(size if axis is None else self.size(axis) for size, axis in zip(shape, axes, strict=False))


def count(skeleton: Skeleton, cut: WidthCut) -> int:
    """The parameters of the whole model as it is then; stored copies of tied ones not counted."""
    index, layout = skeleton.checkpoint.source_index, LAYOUTS[skeleton.family.model_type]
    names = index.keys() - skeleton.stored_copies()
    return sum(math.prod(cut.shape(layout, name, tuple(index[name].shape))) for name in names)

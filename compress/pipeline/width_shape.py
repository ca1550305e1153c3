"""What a width cut leaves of every tensor: which of its axes are channels of the stream, query heads or neurons."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from compress.models.skeleton import Skeleton
from compress.pipeline.cut_job import Cut

Axis = Literal["hidden", "heads", "neurons"]

Axes = tuple[Axis | None, ...]

_READS: Axes = (None, "hidden")
_NORM: Axes = ("hidden",)
AXES: dict[str, Axes] = {
    "embed_tokens": _READS,
    "lm_head": _READS,
    "norm": _NORM,
    "input_layernorm": _NORM,
    "post_attention_layernorm": _NORM,
    "pre_feedforward_layernorm": _NORM,
    "post_feedforward_layernorm": _NORM,
    "q_norm": (None,),
    "k_norm": (None,),
    "q_proj": ("heads", "hidden"),
    "k_proj": _READS,
    "v_proj": _READS,
    "o_proj": ("hidden", "heads"),
    "gate_proj": ("neurons", "hidden"),
    "up_proj": ("neurons", "hidden"),
    "down_proj": ("hidden", "neurons"),
}
"""By the last part of a module's name: what the axes of its weight are; the bias has the first."""


@dataclass(frozen=True, slots=True)
class WidthCut(Cut):
    """neurons of all_neurons stay, and hidden of all_hidden channels of the stream between the blocks; of each of
    kv_heads groups of all_heads query heads, of head_dim each, heads stay.

    parameters: what the whole model then has, of all_parameters; embeddings counted, tied copies not.
    """

    neurons: int
    all_neurons: int
    heads: int
    all_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    all_hidden: int
    parameters: int
    all_parameters: int

    @property
    def narrows(self) -> bool:
        """Whether channels of the stream go."""
        return self.hidden < self.all_hidden

    def size(self, axis: Axis) -> int:
        """How long an axis is then."""
        return {"hidden": self.hidden, "heads": self.heads * self.kv_heads * self.head_dim, "neurons": self.neurons}[
            axis
        ]

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a tensor of the checkpoint then, from the one that it has."""
        axes = AXES.get(module_of(name), ())
        axes += (None,) * (len(shape) - len(axes))
        return tuple(size if axis is None else self.size(axis) for size, axis in zip(shape, axes, strict=False))


def module_of(name: str) -> str:
    """The last part of the name of the module that a tensor belongs to."""
    return name.split(".")[-2] if "." in name else name


def count(skeleton: Skeleton, cut: WidthCut) -> int:
    """The parameters of the whole model as it is then; stored copies of tied ones not counted."""
    index = skeleton.checkpoint.source_index
    names = index.keys() - skeleton.stored_copies()
    return sum(math.prod(cut.shape(name, tuple(index[name].shape))) for name in names)

"""Where each family keeps what a width cut takes away: neurons, query heads, channels of the stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Axis = Literal["hidden", "neurons", "gate_up", "heads", "kv", "qkv"]
"""gate_up: gate and up stacked; kv: all key heads, or all value heads; qkv: query, key and value heads stacked."""
Axes = tuple[Axis | None, ...]

OF_NEURONS: tuple[Axis, ...] = ("neurons", "gate_up")
OF_HEADS: tuple[Axis, ...] = ("heads", "kv", "qkv")
NORM: Axes = ("hidden",)


@dataclass(frozen=True, slots=True)
class Layout:
    """down, out: the linears that neurons and heads feed, by the end of their names. axes: by the end of a module's
    name what (out, in) of its weight are; a bias has the first.

    size: what config.json calls the number of neurons. turned: two-dimensional weights are stored (in, out).
    behind: by the end of the name of `down` or `out`, that of the norm between it and the stream, where there is one.
    heads_stay, stream_stays: why query heads, or channels, cannot go; None where they can. scaled: the embedding is
    multiplied by the root of the width of the stream.
    """

    down: str
    out: str
    axes: Mapping[str, Axes]
    size: str = "intermediate_size"
    turned: bool = False
    heads_stay: str | None = None
    stream_stays: str | None = None
    scaled: bool = False
    behind: Mapping[str, str] = field(default_factory=dict)

    def axes_of(self, name: str) -> Axes | None:
        """What the axes of a tensor (out, in) are, by its checkpoint name; None where that is not known."""
        module = "." + name.rpartition(".")[0]
        return next((axes for end, axes in self.axes.items() if module.endswith(f".{end}")), None)

    def feeds(self, name: str) -> str | None:
        """Of a weight whose rows are neurons or heads: the end of the name of the linear that they feed."""
        axes = self.axes_of(name)
        rows = axes[0] if axes else None
        return self.down if rows in OF_NEURONS else self.out if rows in OF_HEADS else None


_READS: Axes = (None, "hidden")
_AROUND: dict[str, Axes] = {
    "embed_tokens": _READS,
    "lm_head": _READS,
    "norm": NORM,
    "input_layernorm": NORM,
    "post_attention_layernorm": NORM,
    "o_proj": ("hidden", "heads"),
    "down_proj": ("hidden", "neurons"),
}
_APART: dict[str, Axes] = {
    **_AROUND,
    "q_norm": (None,),
    "k_norm": (None,),
    "q_proj": ("heads", "hidden"),
    "k_proj": ("kv", "hidden"),
    "v_proj": ("kv", "hidden"),
    "gate_proj": ("neurons", "hidden"),
    "up_proj": ("neurons", "hidden"),
}
_GEMMA: dict[str, Axes] = {**_APART, "pre_feedforward_layernorm": NORM, "post_feedforward_layernorm": NORM}
_FUSED: dict[str, Axes] = {**_AROUND, "qkv_proj": ("qkv", "hidden"), "gate_up_proj": ("gate_up", "hidden")}

_LLAMA = Layout("mlp.down_proj", "self_attn.o_proj", _APART)
_WITH_NORMS_BEHIND = Layout(
    "mlp.down_proj",
    "self_attn.o_proj",
    _GEMMA,
    scaled=True,
    behind={"mlp.down_proj": "post_feedforward_layernorm", "self_attn.o_proj": "post_attention_layernorm"},
)
_HEADS_STAY = "their config.json gives every head its share of the width of the stream"
_STREAM_STAYS = "their layer norms subtract the mean of all channels"

LAYOUTS: dict[str, Layout] = {
    "gemma2": _WITH_NORMS_BEHIND,
    "gemma3_text": _WITH_NORMS_BEHIND,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "phi3": Layout("mlp.down_proj", "self_attn.o_proj", _FUSED),
    "gpt2": Layout(
        "mlp.c_proj",
        "attn.c_proj",
        {"mlp.c_fc": ("neurons", None), "mlp.c_proj": (None, "neurons")},
        size="n_inner",
        turned=True,
        heads_stay=_HEADS_STAY,
        stream_stays=_STREAM_STAYS,
    ),
    "opt": Layout(
        "fc2",
        "self_attn.out_proj",
        {"fc1": ("neurons", None), "fc2": (None, "neurons")},
        size="ffn_dim",
        heads_stay=_HEADS_STAY,
        stream_stays=_STREAM_STAYS,
    ),
    "gpt_neox": Layout(
        "mlp.dense_4h_to_h",
        "attention.dense",
        {"mlp.dense_h_to_4h": ("neurons", None), "mlp.dense_4h_to_h": (None, "neurons")},
        heads_stay=_HEADS_STAY,
        stream_stays=_STREAM_STAYS,
    ),
}
"""By model type; the others are mixtures, whose neurons are those of experts."""

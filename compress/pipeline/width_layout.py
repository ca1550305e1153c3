"""Where each family keeps what a width cut takes away: neurons, query heads, channels of the stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Axis = Literal["hidden", "neurons", "gate_up", "dense", "shared", "heads", "kv", "qkv", "mla_q", "mla_kv"]
"""gate_up: gate and up stacked; kv: all key heads, or all value heads; qkv: query, key and value heads stacked.

Of a mixture, neurons are those of each routed expert, shared those of the experts that every token goes through, dense
those of blocks without experts. Of latent attention (MLA), mla_q are query heads, mla_kv keys and values of each head
next to each other; heads are then what attention puts out.
"""
Axes = tuple[Axis | None, ...]

OF_NEURONS: tuple[Axis, ...] = ("neurons", "gate_up", "dense", "shared")
OF_HEADS: tuple[Axis, ...] = ("heads", "kv", "qkv", "mla_q", "mla_kv")
NORM: Axes = ("hidden",)


@dataclass(frozen=True, slots=True)
class Layout:
    """down, out: the linears that neurons and heads feed, by the end of their names. axes: by the end of a module's
    name what (out, in) of its weight are; a bias has the first.

    size: what config.json calls the number of neurons; dense_size: of dense blocks in a mixture, where it has some.
    turned: two-dimensional weights are stored (in, out). latent: attention is multi-head latent.
    behind: by the end of the name of `down` or `out`, that of the norm between it and the stream, where there is one.
    heads_stay, stream_stays: why query heads, or channels, cannot go; None where they can. scaled: the embedding is
    multiplied by the root of the width of the stream.
    """

    down: str
    out: str
    axes: Mapping[str, Axes]
    size: str = "intermediate_size"
    dense_size: str | None = None
    turned: bool = False
    latent: bool = False
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

_ROUTED: dict[str, Axes] = {"gate": _READS}
_MIXTURE: dict[str, Axes] = {  # before the names of single experts, which end alike
    **{f"mlp.{part}_proj": ("dense", "hidden") for part in ("gate", "up")},
    "mlp.down_proj": ("hidden", "dense"),
    **{f"shared_experts.{part}_proj": ("shared", "hidden") for part in ("gate", "up")},
    "shared_experts.down_proj": ("hidden", "shared"),
    **_APART,
    **_ROUTED,
}
_LATENT: dict[str, Axes] = {
    **_MIXTURE,
    "q_proj": ("mla_q", "hidden"),
    "q_a_proj": _READS,
    "q_a_layernorm": (None,),
    "q_b_proj": ("mla_q", None),
    "kv_a_proj_with_mqa": _READS,
    "kv_a_layernorm": (None,),
    "kv_b_proj": ("mla_kv", None),
}
_NAMED_BY_NUMBER: dict[str, Axes] = {
    "w1": ("neurons", "hidden"),
    "w3": ("neurons", "hidden"),
    "w2": ("hidden", "neurons"),
}

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
    "mixtral": Layout(".w2", "self_attn.o_proj", {**_APART, **_ROUTED, **_NAMED_BY_NUMBER}),
    "qwen3_moe": Layout(
        ".down_proj", "self_attn.o_proj", _MIXTURE, size="moe_intermediate_size", dense_size="intermediate_size"
    ),
    "deepseek_v3": Layout(
        ".down_proj",
        "self_attn.o_proj",
        _LATENT,
        size="moe_intermediate_size",
        dense_size="intermediate_size",
        latent=True,
    ),
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
"""By model type: every family."""

"""What is known of each architecture, as data: where its blocks are, what feeds what, what engines fuse.

Names are module paths inside one decoder block, as transformers builds it with per-expert linears; `*` stands for
every expert's number. A pattern that matches nothing in a block (a dense block of a mixture, an absent projection)
is dropped, so one entry serves all variants of a family. Skeleton turns these into checkpoint names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from compress.errors import UserError

Kind = Literal["norm", "linear"]


@dataclass(frozen=True, slots=True)
class Edge:
    """A place where a positive per-channel scale s moves without changing the block: producer / s, consumers * s.

    kind "norm": the producer is a norm; its weight (and bias where `has_bias`) is divided. `offset`: it computes with
    (1 + w), so w becomes (1 + w) / s - 1. kind "linear": the producer is a linear; the output rows in `rows`
    (start, end; None: all) and their bias are divided. Each consumer's input channels are multiplied. Names are
    checkpoint module names; len(s) = channels = every consumer's in_features.
    """

    producer: str
    consumers: tuple[str, ...]
    kind: Kind
    offset: bool = False
    has_bias: bool = False
    rows: tuple[int, int] | None = None


def _always(config: Any) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class EdgeRule:
    """The pattern of an Edge: `when` says for which configs it holds, `rows` which rows of a fused producer count."""

    producer: str
    consumers: tuple[str, ...]
    kind: Kind = "norm"
    when: Callable[[Any], bool] = _always
    rows: Callable[[Any], tuple[int, int]] | None = None


@dataclass(frozen=True, slots=True)
class Branch:
    """A linear whose output is added to the residual stream as it stands where `norm` reads it; `when` as EdgeRule's.

    Both are module paths in the block. Where a norm stands behind the linear, its output is not what is added.
    """

    norm: str
    writer: str
    when: Callable[[Any], bool] = _always


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Where a block keeps its experts and what one expert's three linears are called on disk."""

    path: str = "mlp.experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture: `blocks` is the module path of its block list, `routers` are never quantised."""

    model_type: str
    rules: tuple[EdgeRule, ...]
    fusions: tuple[tuple[str, ...], ...] = ()
    blocks: str = "model.layers"
    offset_norms: bool = False
    routers: tuple[str, ...] = ()
    experts: ExpertNames | None = None
    branches: tuple[Branch, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    """(part of a transformers name, what checkpoints may have in its place)"""


def family_of(model_type: object) -> Family:
    """The Family of config.json's model_type; raises UserError naming the supported ones."""
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(sorted(family.model_type for family in FAMILIES))
    raise UserError(f"the model type {model_type!r} is not supported", f"supported model types: {known}")


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _value_rows(config: Any) -> tuple[int, int]:
    """The rows of v in a linear that stacks q, k and v."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    start = (heads + kv_heads) * _head_dim(config)
    return start, start + kv_heads * _head_dim(config)


def _up_rows(config: Any) -> tuple[int, int]:
    """The rows of up in a linear that stacks gate and up."""
    return config.intermediate_size, 2 * config.intermediate_size


def _relu(config: Any) -> bool:
    """ReLU alone among the usual activations has f(a x) = a f(x) for a > 0, so a scale passes through it."""
    return (getattr(config, "activation_function", None) or getattr(config, "hidden_act", None)) == "relu"


def _norm_first(config: Any) -> bool:
    return bool(config.do_layer_norm_before)


def _one_after_the_other(config: Any) -> bool:
    return not config.use_parallel_residual


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

_ATTENTION = (
    EdgeRule("input_layernorm", _QKV),
    EdgeRule("self_attn.v_proj", ("self_attn.o_proj",), "linear"),
)
_GATED_DOWN = EdgeRule("mlp.up_proj", ("mlp.down_proj",), "linear")
_DENSE = (*_ATTENTION, EdgeRule("post_attention_layernorm", _GATE_UP), _GATED_DOWN)
_GEMMA = (*_ATTENTION, EdgeRule("pre_feedforward_layernorm", _GATE_UP), _GATED_DOWN)
_DENSE_FUSIONS = (_QKV, _GATE_UP)

_BRANCHES = (
    Branch("input_layernorm", "self_attn.o_proj"),
    Branch("post_attention_layernorm", "mlp.down_proj"),
)

_EXPERT_GATE_UP = ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")
_SHARED_GATE_UP = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")
_MOE = (
    EdgeRule("post_attention_layernorm", ("mlp.gate", *_EXPERT_GATE_UP, *_SHARED_GATE_UP, *_GATE_UP)),
    _GATED_DOWN,
    EdgeRule("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",), "linear"),
    EdgeRule("mlp.shared_experts.up_proj", ("mlp.shared_experts.down_proj",), "linear"),
)

FAMILIES: tuple[Family, ...] = (
    Family("llama", _DENSE, _DENSE_FUSIONS, branches=_BRANCHES),
    Family("mistral", _DENSE, _DENSE_FUSIONS, branches=_BRANCHES),
    Family("qwen2", _DENSE, _DENSE_FUSIONS, branches=_BRANCHES),
    Family("qwen3", _DENSE, _DENSE_FUSIONS, branches=_BRANCHES),
    Family("gemma2", _GEMMA, _DENSE_FUSIONS, offset_norms=True),
    Family("gemma3_text", _GEMMA, _DENSE_FUSIONS, offset_norms=True),
    Family(
        "phi3",
        (
            EdgeRule("input_layernorm", ("self_attn.qkv_proj",)),
            EdgeRule("self_attn.qkv_proj", ("self_attn.o_proj",), "linear", rows=_value_rows),
            EdgeRule("post_attention_layernorm", ("mlp.gate_up_proj",)),
            EdgeRule("mlp.gate_up_proj", ("mlp.down_proj",), "linear", rows=_up_rows),
        ),
        branches=_BRANCHES,
    ),
    Family(
        "gpt2",
        (
            EdgeRule("ln_1", ("attn.c_attn",)),
            EdgeRule("attn.c_attn", ("attn.c_proj",), "linear", rows=_value_rows),
            EdgeRule("ln_2", ("mlp.c_fc",)),
            EdgeRule("mlp.c_fc", ("mlp.c_proj",), "linear", when=_relu),
        ),
        blocks="transformer.h",
        branches=(Branch("ln_1", "attn.c_proj"), Branch("ln_2", "mlp.c_proj")),
    ),
    Family(
        "opt",
        (
            EdgeRule("self_attn_layer_norm", _QKV, when=_norm_first),
            EdgeRule("self_attn.v_proj", ("self_attn.out_proj",), "linear"),
            EdgeRule("final_layer_norm", ("fc1",), when=_norm_first),
            EdgeRule("fc1", ("fc2",), "linear", when=_relu),
        ),
        (_QKV,),
        blocks="model.decoder.layers",
        branches=(
            Branch("self_attn_layer_norm", "self_attn.out_proj", when=_norm_first),
            Branch("final_layer_norm", "fc2", when=_norm_first),
        ),
    ),
    Family(
        "gpt_neox",
        (
            EdgeRule("input_layernorm", ("attention.query_key_value",)),
            EdgeRule("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
            EdgeRule("mlp.dense_h_to_4h", ("mlp.dense_4h_to_h",), "linear", when=_relu),
        ),
        blocks="gpt_neox.layers",
        branches=(
            Branch("input_layernorm", "attention.dense"),
            Branch("post_attention_layernorm", "mlp.dense_4h_to_h", when=_one_after_the_other),
        ),
        renames=(("lm_head.", "embed_out."),),
    ),
    Family(
        "mixtral",
        (
            *_ATTENTION,
            EdgeRule("post_attention_layernorm", ("mlp.gate", "mlp.experts.*.w1", "mlp.experts.*.w3")),
            EdgeRule("mlp.experts.*.w3", ("mlp.experts.*.w2",), "linear"),
        ),
        (_QKV, ("mlp.experts.*.w1", "mlp.experts.*.w3")),
        routers=("mlp.gate",),
        experts=ExpertNames(gate="w1", up="w3", down="w2"),
        branches=_BRANCHES,
        renames=((".mlp.", ".block_sparse_moe."),),
    ),
    Family(
        "qwen3_moe",
        (*_ATTENTION, *_MOE),
        (*_DENSE_FUSIONS, _EXPERT_GATE_UP),
        routers=("mlp.gate",),
        experts=ExpertNames(),
        branches=_BRANCHES,
    ),
    Family(
        "deepseek_v3",
        (
            EdgeRule("input_layernorm", ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")),
            EdgeRule("self_attn.q_a_layernorm", ("self_attn.q_b_proj",)),
            EdgeRule("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",)),
            *_MOE,
        ),
        (_GATE_UP, _EXPERT_GATE_UP, _SHARED_GATE_UP),
        routers=("mlp.gate",),
        experts=ExpertNames(),
        branches=_BRANCHES,
    ),
)

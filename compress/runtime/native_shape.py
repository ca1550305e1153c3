"""Whether the native engine computes a checkpoint, and the names and shapes of what it then reads.

Everything is decided from the config and the file headers, before a weight is touched. What does not fit to the last
tensor is left to the transformers back end, which runs it or says what is wrong with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from compress.errors import CompressError, IntegrityError
from compress.formats import kv_cache
from compress.formats.registry import FORMATS, Format
from compress.kernels.packed_linear import obstacle
from compress.models.checkpoint import Checkpoint
from compress.models.families import ExpertNames
from compress.runtime import native_reader
from compress.runtime.config_checks import check_numbers
from compress.runtime.native_families import NATIVE_FAMILIES, NativeFamily
from compress.runtime.native_weights import DENSE, free_parts, input_scale
from compress.runtime.native_weights import expected as stored
from compress.types import InputScheme, Scheme

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"
_ALL = 2**31 - 1


class Unsupported(Exception):
    """The native engine does not compute this checkpoint; the message says why, as part of a sentence."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows [start, end) of a stored linear."""

    linear: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class LayerNames:
    """What a layer reads. attention: q, k, v, o. experts: gate, up, down of each, one where there is no router.

    norms: by what the native decoder calls them; None where the layer has none.
    """

    attention: tuple[Part, ...]
    experts: tuple[tuple[Part, ...], ...]
    router: str | None
    norms: dict[str, str | None]


@dataclass(frozen=True, slots=True)
class Shape:
    """What the engine needs to know of a model. `windows`: positions that a token of each layer sees.

    ffn: rows of gate in a layer without experts; expert_ffn, experts, chosen: of a mixture, else 0. mlp: what a
    checkpoint calls the feed-forward part.
    """

    config: Any
    family: NativeFamily
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    layers: int
    windows: tuple[int, ...]
    tied: bool
    experts: int
    chosen: int
    expert_ffn: int
    mlp: str
    schemes: dict[str, Scheme]
    format: Format

    def layer(self, i: int) -> LayerNames:
        """The names of one layer's linears and norms."""
        prefix = f"model.layers.{i}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.{self.mlp}"
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        output = Part(f"{attention}.o_proj", 0, self.hidden)
        heads: tuple[Part, ...]
        if self.family.fused:
            stacked = f"{attention}.qkv_proj"
            heads = (Part(stacked, 0, q), Part(stacked, q, q + kv), Part(stacked, q + kv, q + 2 * kv), output)
        else:
            sizes = {"q_proj": q, "k_proj": kv, "v_proj": kv}
            heads = (*(Part(f"{attention}.{name}", 0, size) for name, size in sizes.items()), output)
        router = f"{mlp}.gate" if self.family.mixes(self.config, i) else None
        experts: tuple[tuple[Part, ...], ...]
        if router is not None:
            names = self.family.expert_names
            experts = tuple(self._gated(f"{mlp}.experts.{e}", names, self.expert_ffn) for e in range(self.experts))
        elif self.family.fused:
            stacked, down = f"{mlp}.gate_up_proj", Part(f"{mlp}.down_proj", 0, self.hidden)
            experts = ((Part(stacked, 0, self.ffn), Part(stacked, self.ffn, 2 * self.ffn), down),)
        else:
            experts = (self._gated(f"{prefix}.mlp", ExpertNames(), self.ffn),)
        return LayerNames(heads, experts, router, self._norms(prefix))

    def _gated(self, prefix: str, names: ExpertNames, width: int) -> tuple[Part, ...]:
        sizes = {names.gate: width, names.up: width, names.down: self.hidden}
        return tuple(Part(f"{prefix}.{name}", 0, size) for name, size in sizes.items())

    def _norms(self, prefix: str) -> dict[str, str | None]:
        out, heads = self.family.out_norms, self.family.head_norms
        return {
            "attention_norm": f"{prefix}.input_layernorm",
            "mlp_norm": f"{prefix}.{'pre_feedforward' if out else 'post_attention'}_layernorm",
            "q_norm": f"{prefix}.self_attn.q_norm" if heads else None,
            "k_norm": f"{prefix}.self_attn.k_norm" if heads else None,
            "attention_out_norm": f"{prefix}.post_attention_layernorm" if out else None,
            "mlp_out_norm": f"{prefix}.post_feedforward_layernorm" if out else None,
        }

    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> (out, in) of every linear as it is stored, routers too, in the order of computation."""
        found: dict[str, tuple[int, int]] = {}

        def add(part: Part, width: int) -> None:
            found[part.linear] = (max(part.end, found.get(part.linear, (0, 0))[0]), width)

        for i in range(self.layers):
            names = self.layer(i)
            for part in names.attention[:3]:
                add(part, self.hidden)
            add(names.attention[3], self.heads * self.head_dim)
            if names.router is not None:
                found[names.router] = (self.experts, self.hidden)
            for gate, up, down in names.experts:
                add(gate, self.hidden)
                add(up, self.hidden)
                add(down, gate.end - gate.start)
        return found if self.tied else found | {HEAD: (self.vocabulary, self.hidden)}

    def norms(self) -> dict[str, int]:
        """Name -> length of every norm."""
        found = {
            name: self.head_dim if kind in ("q_norm", "k_norm") else self.hidden
            for i in range(self.layers)
            for kind, name in self._norms(f"model.layers.{i}").items()
            if name is not None
        }
        return found | {FINAL_NORM: self.hidden}

    def routers(self) -> set[str]:
        """The names of the routers among the linears."""
        return {names.router for names in map(self.layer, range(self.layers)) if names.router is not None}


def shape_of(checkpoint: Checkpoint, config: Any) -> Shape:
    """The checkpoint's shape. `config` is what transformers makes of its config.json.

    Raises:
        Unsupported: the native engine does not compute it.
        UserError: a number in the config that no model has.
    """
    family = NATIVE_FAMILIES.get(config.model_type)
    if family is None:
        raise Unsupported(f"models of type {config.model_type} are not among {', '.join(NATIVE_FAMILIES)}")
    activation = "gelu_pytorch_tanh" if family.scaled else "silu"
    found = config.hidden_activation if family.scaled else config.hidden_act
    if found != activation:
        raise Unsupported(f"its activation is {found}")
    if getattr(config, "use_bidirectional_attention", False):
        raise Unsupported("its tokens see those behind them")
    check_numbers(config, family)
    _check_rope(family, config)
    layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None) or _ALL
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    heads = config.num_attention_heads
    experts, expert_ffn = (getattr(config, name) for name in family.experts) if family.experts else (0, 0)
    chosen = config.num_experts_per_tok if experts else 0
    if chosen > experts:
        raise Unsupported(f"its tokens go to {chosen} of {experts} experts")
    mixed = sum(family.mixes(config, i) for i in range(layers))
    if mixed * experts > len(checkpoint.index):  # before anything is made for each of them
        raise Unsupported(f"it has no tensor for each of {mixed} x {experts} experts")
    if len(kinds) != layers:
        raise Unsupported(f"its config has {len(kinds)} layer_types for {layers} layers")
    format, schemes = _packed_linears(checkpoint)
    shape = Shape(
        config=config,
        family=family,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=config.num_key_value_heads or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        ffn=config.intermediate_size,
        vocabulary=config.vocab_size,
        layers=layers,
        windows=tuple(window if family.one_window or kind == "sliding_attention" else _ALL for kind in kinds),
        tied=bool(config.tie_word_embeddings),
        experts=experts,
        chosen=chosen,
        expert_ffn=expert_ffn,
        mlp="block_sparse_moe" if any(".block_sparse_moe." in name for name in checkpoint.index) else "mlp",
        schemes=schemes,
        format=format,
    )
    if shape.head_dim % 2 or shape.heads % shape.kv_heads:
        raise Unsupported(f"it has {heads} heads of {shape.head_dim} over {shape.kv_heads}")
    _check_tensors(checkpoint, shape)
    _check_inputs(checkpoint, shape)
    return shape


def _check_rope(family: NativeFamily, config: Any) -> None:
    rope = config.rope_parameters or {}
    for one in rope.values() if family.rope_by_type else (rope,):
        if not isinstance(one, dict):
            raise Unsupported("its rotary embedding is not described by layer type")
        kind = one.get("rope_type", "default")
        if kind not in ROPE_TYPES or (kind == "longrope" and family.rope_by_type):
            raise Unsupported(f"its rotary embedding is of type {kind}")
        if one.get("partial_rotary_factor", 1.0) != 1.0 and not family.partial_rotary:
            raise Unsupported("its rotary embedding turns a part of each head")


def _packed_linears(checkpoint: Checkpoint) -> tuple[Format, dict[str, Scheme]]:
    quantization = checkpoint.config.get("quantization_config")
    if not quantization:
        return FORMATS["compressed-tensors"], {}
    if not native_reader.reads(checkpoint.config):
        raise Unsupported("its weights are in no layout that is read here")
    if quantization.get("desc_act"):
        raise Unsupported("its groups of inputs follow the activation order")
    try:
        return native_reader.packed_linears(checkpoint)
    except (CompressError, KeyError, TypeError, ValueError) as error:
        raise Unsupported(f"its quantization_config cannot be read ({error})") from error


def _check_inputs(checkpoint: Checkpoint, shape: Shape) -> None:
    """Linears that read the same inputs, which the engine rounds once for all of them, round them alike."""
    embedding = shape.schemes.get(EMBEDDING)
    if embedding is not None and embedding.inputs is not None:
        raise Unsupported("its embedding rounds inputs, and has none")

    def way(part: Part) -> tuple[InputScheme | None, float]:
        scheme = shape.schemes.get(part.linear)
        if scheme is None:
            return None, 0.0
        try:
            return scheme.inputs, input_scale(checkpoint, shape.format, part.linear, scheme)
        except IntegrityError as error:
            raise Unsupported(f"{part.linear}.{error.message}") from error

    for i in range(shape.layers):
        names = shape.layer(i)
        for parts in (names.attention[:3], *(expert[:2] for expert in names.experts)):
            if len({way(part) for part in parts}) > 1:
                raise Unsupported(f"{parts[0].linear} and others that read the same inputs do not round them alike")


def _check_tensors(checkpoint: Checkpoint, shape: Shape) -> None:
    """Every tensor that the shape needs is there with its size and a known dtype, and no other is."""
    expected: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
        f"{name}.weight": ((length,), DENSE) for name, length in shape.norms().items()
    }
    free: set[str] = set()
    routers = shape.routers()
    for name, (out, width) in {EMBEDDING: (shape.vocabulary, shape.hidden), **shape.linears()}.items():
        if f"{name}.bias" in checkpoint.index:
            expected[f"{name}.bias"] = ((out,), DENSE)
        scheme = shape.schemes.get(name)
        if scheme is not None and name in routers:
            raise Unsupported(f"its router {name} is quantised")
        if scheme is None:
            expected[f"{name}.weight"] = ((out, width), DENSE)
            continue
        if not 2 <= scheme.bits <= 8 or not scheme.fits(width):
            raise Unsupported(f"{name} is packed in {scheme.bits} bits and groups of {scheme.group_size}")
        if (reason := obstacle(scheme, width)) is not None:
            raise Unsupported(f"{name}: {reason}")
        expected |= {f"{name}.{part}": rule for part, rule in stored(shape.format, scheme, out, width).items()}
        free |= {f"{name}.{part}" for part in free_parts(shape.format)}
    if kv_cache.is_described(checkpoint.config.get("quantization_config") or {}):
        for i in range(shape.layers):
            expected |= {f"model.layers.{i}.self_attn.{part}": ((1,), DENSE) for part in kv_cache.PARTS}
    for name, (size, dtypes) in expected.items():
        info = checkpoint.index.get(name)
        if info is None or tuple(info.shape) != size or info.dtype not in dtypes:
            raise Unsupported(f"{name} is missing, or not of shape {size}")
    if extra := sorted(checkpoint.index.keys() - expected.keys() - free):
        raise Unsupported(f"it holds {extra[0]}, which has no place in the architecture")

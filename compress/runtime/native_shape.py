"""Whether the native engine computes a checkpoint, and the names and shapes of what it then reads.

Everything is decided from the config and the file headers, before a weight is touched. What does not fit to the last
tensor is left to the transformers back end, which runs it or says what is wrong with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from compress.errors import CompressError
from compress.formats.registry import FORMATS, Format
from compress.kernels.packed_linear import obstacle
from compress.models.checkpoint import Checkpoint
from compress.runtime import native_reader
from compress.types import IntScheme, Scheme

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"
_DENSE = (torch.bfloat16, torch.float16, torch.float32)
_ALL = 2**31 - 1


class Unsupported(Exception):
    """The native engine does not compute this checkpoint; the message says why, as part of a sentence."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the engine needs to know of a model. `windows`: positions that a token of each layer sees."""

    config: Any
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    layers: int
    windows: tuple[int, ...]
    tied: bool
    head_norms: bool
    schemes: dict[str, IntScheme]
    format: Format

    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> (out, in) of every linear, in the order of computation."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = ((q, self.hidden), (kv, self.hidden), (kv, self.hidden), (self.hidden, q))
        mlp = ((self.ffn, self.hidden), (self.ffn, self.hidden), (self.hidden, self.ffn))
        found: dict[str, tuple[int, int]] = {}
        for i in range(self.layers):
            found |= {f"model.layers.{i}.self_attn.{n}": s for n, s in zip(ATTENTION, attention, strict=True)}
            found |= {f"model.layers.{i}.mlp.{n}": s for n, s in zip(MLP, mlp, strict=True)}
        return found if self.tied else found | {HEAD: (self.vocabulary, self.hidden)}

    def norms(self) -> dict[str, int]:
        """Name -> length of every norm."""
        found: dict[str, int] = {}
        for i in range(self.layers):
            found |= {f"model.layers.{i}.{n}": self.hidden for n in ("input_layernorm", "post_attention_layernorm")}
            if self.head_norms:
                found |= {f"model.layers.{i}.self_attn.{n}": self.head_dim for n in ("q_norm", "k_norm")}
        return found | {FINAL_NORM: self.hidden}


def shape_of(checkpoint: Checkpoint, config: Any) -> Shape:
    """The checkpoint's shape. `config` is what transformers makes of its config.json.

    Raises:
        Unsupported: the native engine does not compute it.
    """
    kind = config.model_type
    if kind not in MODEL_TYPES:
        raise Unsupported(f"models of type {kind} are not among {', '.join(MODEL_TYPES)}")
    if config.hidden_act != "silu":
        raise Unsupported(f"its activation is {config.hidden_act}")
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        raise Unsupported(f"its rotary embedding is of type {rope.get('rope_type')}")
    layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None) or _ALL
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if kind == "mistral" else "full"] * layers
    heads = config.num_attention_heads
    format, schemes = _packed_linears(checkpoint)
    shape = Shape(
        config=config,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=config.num_key_value_heads or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        ffn=config.intermediate_size,
        vocabulary=config.vocab_size,
        layers=layers,
        windows=tuple(window if kind == "sliding_attention" else _ALL for kind in kinds),
        tied=bool(config.tie_word_embeddings),
        head_norms=kind == "qwen3",
        schemes=schemes,
        format=format,
    )
    if shape.head_dim % 2 or shape.heads % shape.kv_heads:
        raise Unsupported(f"it has {heads} heads of {shape.head_dim} over {shape.kv_heads}")
    _check_tensors(checkpoint, shape)
    return shape


def _packed_linears(checkpoint: Checkpoint) -> tuple[Format, dict[str, IntScheme]]:
    quantization = checkpoint.config.get("quantization_config")
    if not quantization:
        return FORMATS["compressed-tensors"], {}
    if not native_reader.reads(checkpoint.config):
        raise Unsupported("its weights are not packed integers")
    if quantization.get("desc_act"):
        raise Unsupported("its groups of inputs follow the activation order")
    try:
        format, schemes = native_reader.packed_linears(checkpoint)
    except (CompressError, KeyError, TypeError, ValueError) as error:
        raise Unsupported(f"its quantization_config cannot be read ({error})") from error
    return format, {name: _packed(scheme) for name, scheme in schemes.items()}


def _packed(scheme: Scheme) -> IntScheme:
    if isinstance(scheme, IntScheme) and scheme.inputs is None:
        return scheme
    if scheme.inputs is None:
        raise Unsupported(f"{scheme.name} is no layout of packed integers")
    raise Unsupported(f"{scheme.name} rounds what enters its linears, which the engine leaves as it is")


def _check_tensors(checkpoint: Checkpoint, shape: Shape) -> None:
    """Every tensor that the shape needs is there with its size and a known dtype, and no other is."""
    expected: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
        f"{name}.weight": ((length,), _DENSE) for name, length in shape.norms().items()
    }
    for name, (out, width) in {EMBEDDING: (shape.vocabulary, shape.hidden), **shape.linears()}.items():
        if f"{name}.bias" in checkpoint.index:
            expected[f"{name}.bias"] = ((out,), _DENSE)
        scheme = shape.schemes.get(name)
        if scheme is None:
            expected[f"{name}.weight"] = ((out, width), _DENSE)
            continue
        if not 2 <= scheme.bits <= 8 or not scheme.fits(width):
            raise Unsupported(f"{name} is packed in {scheme.bits} bits and groups of {scheme.group_size}")
        if (reason := obstacle(scheme, width)) is not None:
            raise Unsupported(f"{name}: {reason}")
        if shape.format.layout is not None:
            stored = shape.format.layout(scheme, out, width)
            expected |= {f"{name}.{part}": (size, (dtype,)) for part, (size, dtype) in stored.items()}
            continue
        groups = scheme.groups(width)
        expected[f"{name}.weight_packed"] = ((out, -(-width * scheme.bits // 32)), (torch.int32,))
        expected[f"{name}.weight_scale"] = ((out, groups), _DENSE)
        expected[f"{name}.weight_shape"] = ((2,), (torch.int64,))
        if not scheme.symmetric:
            expected[f"{name}.weight_zero_point"] = ((-(-out * scheme.bits // 32), groups), (torch.int32,))
    for name, (size, dtypes) in expected.items():
        info = checkpoint.index.get(name)
        if info is None or tuple(info.shape) != size or info.dtype not in dtypes:
            raise Unsupported(f"{name} is missing, or not of shape {size}")
    if extra := sorted(checkpoint.index.keys() - expected.keys()):
        raise Unsupported(f"it holds {extra[0]}, which has no place in the architecture")

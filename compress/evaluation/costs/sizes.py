"""Bytes and bits per weight by class of tensor, from the headers of the weight files: exact, and no weight is read.

Classes go by names, because a packed file no longer has the modules they came from; routers go by what is known of the
architecture. What no rule knows is `other`, so the classes always add up to the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from compress.errors import UserError
from compress.evaluation.costs.record import ClassSize, SizeRecord, TensorClass
from compress.models.checkpoint import Checkpoint
from compress.models.families import family_of
from compress.models.safetensors_header import TensorInfo
from compress.runtime.native_reader import packed_linears, reads

_CLASSES: tuple[TensorClass, ...] = (
    *("embedding", "head", "attention", "mlp", "experts", "router", "norms", "scales", "other"),
)
_SCALE_PART = re.compile(r"((weight|input|output)_(scale|zero_point|shape|g_idx|global_scale)\w*|qzeros|scales|g_idx)")
_PACKED_PART = re.compile(r"weight_packed|qweight|weight_bitmask|weight_values")

# The first pattern that is found in a module's name decides.
_RULES: tuple[tuple[str, TensorClass], ...] = (
    (r"(^|[._])(rotary_emb|inv_freq)(\.|$)", "other"),
    (r"norm|(^|\.)ln_[0-9a-z]+(\.|$)", "norms"),
    (r"(^|\.)(embed_tokens|embed_positions|embed_in|wte|wpe|tok_embeddings|word_embeddings)(\.|$)", "embedding"),
    (r"^(lm_head|embed_out|output)(\.|$)", "head"),
    (r"(^|\.)(experts|shared_experts?)(\.|$)", "experts"),
    (r"(^|\.)(self_attn|attn|attention)\.\w+", "attention"),
    (r"(^|\.)(mlp|block_sparse_moe|feed_forward|fc1|fc2)(\.|$)", "mlp"),
)


@dataclass(frozen=True, slots=True)
class Stored:
    """One module's tensors in the files: its class, values, scales and the dense weights they stand for."""

    tensor_class: TensorClass
    packed: bool
    tensors: int
    weights: int
    bytes: int
    scale_bytes: int


def stored_modules(checkpoint: Checkpoint) -> dict[str, Stored]:
    """What the files hold of each module, by the module's name on disk."""
    try:
        family_routers = family_of(checkpoint.config.get("model_type")).routers
    except UserError:  # an architecture that we do not quantise can still be weighed
        family_routers = ()
    routers = (*family_routers, "block_sparse_moe.gate", "mlp.router")
    groups: dict[str, dict[str, TensorInfo]] = {}
    for name, info in checkpoint.index.items():
        module, _, part = name.rpartition(".")
        groups.setdefault(module, {})[part] = info
    return {module: _stored(checkpoint, module, parts, routers) for module, parts in groups.items()}


def size_record(checkpoint: Checkpoint, parameters: int) -> SizeRecord:
    """The sizes of a checkpoint that stands for `parameters` weights (tied ones once)."""
    modules = stored_modules(checkpoint)
    shards = {info.shard for info in checkpoint.index.values()}
    file_bytes = sum((checkpoint.path / shard).stat().st_size for shard in shards)
    return SizeRecord(
        file_bytes=file_bytes,
        header_bytes=file_bytes - checkpoint.nbytes,
        weights=parameters,
        bits_per_weight=8 * checkpoint.nbytes / parameters,
        classes=_classes(modules),
    )


def classify(module: str, routers: tuple[str, ...] = ()) -> TensorClass:
    """The class of a module by its name on disk; `routers` are the endings of routers' names."""
    if any(module.endswith(f".{router}") for router in routers):
        return "router"
    return next((name for pattern, name in _RULES if re.search(pattern, module)), "other")


def _stored(checkpoint: Checkpoint, module: str, parts: Mapping[str, TensorInfo], routers: tuple[str, ...]) -> Stored:
    values = {part: info for part, info in parts.items() if not _SCALE_PART.fullmatch(part)}
    scales = {part: info for part, info in parts.items() if part not in values}
    return Stored(
        tensor_class=classify(module, routers),
        packed=any(_PACKED_PART.fullmatch(part) for part in values) or _small(values) or bool(scales),
        tensors=len(values),
        weights=sum(_weights(checkpoint, module, part, info, parts) for part, info in values.items()),
        bytes=sum(info.nbytes for info in values.values()),
        scale_bytes=sum(info.nbytes for info in scales.values()),
    )


def _small(values: Mapping[str, TensorInfo]) -> bool:
    return any(len(info.shape) >= 2 and info.dtype.itemsize < 2 for info in values.values())


def _weights(checkpoint: Checkpoint, module: str, part: str, info: TensorInfo, parts: Mapping[str, TensorInfo]) -> int:
    """Dense weights behind one tensor. Packed ones say their shape; FP4 without a shape holds two codes a byte."""
    if part == "weight_values":
        return 0  # counted with the mask that says where they are
    if part in ("weight_packed", "weight_bitmask"):
        if "weight_shape" in parts:
            return math.prod(checkpoint.read(f"{module}.weight_shape").tolist())
        return 2 * math.prod(info.shape)
    if part == "qweight" and reads(checkpoint.config):
        return math.prod(info.shape) * 32 // packed_linears(checkpoint)[1][module].bits
    return math.prod(info.shape)


def _classes(modules: Mapping[str, Stored]) -> list[ClassSize]:
    found = []
    for name in _CLASSES:
        members = [stored for stored in modules.values() if stored.tensor_class == name]
        tensors, weights = sum(m.tensors for m in members), sum(m.weights for m in members)
        values, scales = sum(m.bytes for m in members), sum(m.scale_bytes for m in members)
        if name == "scales":
            values, scales = sum(m.scale_bytes for m in modules.values()), 0
            tensors = sum(m.scale_bytes > 0 for m in modules.values())
        if tensors:
            bits = 8 * (values + scales) / weights if weights else None
            found.append(
                ClassSize(
                    name=name, tensors=tensors, weights=weights, bytes=values, scale_bytes=scales, bits_per_weight=bits
                )
            )
    return found

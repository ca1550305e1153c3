"""How many bits the quantised linears may take, so that bits per weight or the bytes of the file keep a target."""

from __future__ import annotations

import math
from collections.abc import Sequence

from compress.artifact.publish import DEFAULT_SHARD_BYTES
from compress.artifact.tensorfile import encode_header
from compress.errors import UserError
from compress.formats.safetensors_header import ELEMENT_BYTES, TORCH_NAMES
from compress.models.skeleton import LinearSpec
from compress.pipeline.job import Job
from compress.types import IntScheme
from compress.workflows.budget.target import Target
from compress.workflows.budget.units import Unit

_NAMES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}
SHAPE_BYTES = 16
"""Two int64 per packed linear that spell its shape; part of the file, not of its bits per weight."""

Tensor = tuple[str, str, tuple[int, ...], int]


def allowed_bits(target: Target, job: Job, units: Sequence[Unit]) -> int:
    """Bits for all units together.

    Raises:
        UserError: even the smallest option of every unit takes more; says what the nearest target is.
    """
    weights = sum(unit.weights for unit in units)
    least, most = (sum(pick(unit.bits) for unit in units) for pick in (min, max))
    if target.kind == "bits":
        allowed = math.floor(target.value * weights)
        nearest = f"--target-bits {math.ceil(1000 * least / weights) / 1000:g}"
    elif target.kind == "file-bits":
        parameters = job.skeleton.parameters()
        around_bits = 8 * tensor_bytes(job, units, 0)
        allowed = math.floor(target.value * parameters) - around_bits
        nearest = f"--target-file-bits {math.ceil(1000 * (around_bits + least) / parameters) / 1000:g}"
    else:
        around = file_bytes(job, units, most) - most // 8
        allowed = 8 * (int(target.value) - around)
        nearest = f"--target-size {around + math.ceil(least / 8)}"
    if least > allowed:
        raise UserError(
            f"{target.option} {target.value:g} cannot be met: the smallest that the options give is more",
            f"the nearest is {nearest}; ignored linears keep their precision, and so do embeddings and head without "
            "--embeddings auto and --head auto",
        )
    return allowed


def file_bytes(job: Job, units: Sequence[Unit], bits: int) -> int:
    """Bytes of the weight files at most, if the units take so many bits.

    Headers are counted as for the largest options: offsets in them have as many digits, or fewer, for any choice.
    """
    tensors = _tensors(job, units)
    total = sum(nbytes for *_, nbytes in tensors)
    shards = total // DEFAULT_SHARD_BYTES + 1
    return tensor_bytes(job, units, bits) + len(encode_header(tensors)) + 128 * (shards - 1)


def tensor_bytes(job: Job, units: Sequence[Unit], bits: int) -> int:
    """Bytes of all tensors, if the units take so many bits."""
    replaced = _replaced(job, units)
    kept = sum(nbytes for name, _, _, nbytes in _tensors(job, units) if name in job.checkpoint.index)
    chosen = {spec.weight for unit in units for spec in unit.linears}
    fixed = sum(job.stored_bits(spec) for weight, (spec, _) in replaced.items() if weight not in chosen)
    return kept + SHAPE_BYTES * len(replaced) + math.ceil((bits + fixed) / 8)


def _replaced(job: Job, units: Sequence[Unit]) -> dict[str, tuple[LinearSpec, IntScheme]]:
    """By dense tensor, what is packed in its place: the largest option of each unit, and tables of a given scheme."""
    found = {spec.weight: (spec, job.integers(spec)) for spec in job.tables}
    return found | {spec.weight: (spec, unit.options[-1]) for unit in units for spec in unit.linears}


def _tensors(job: Job, units: Sequence[Unit]) -> list[Tensor]:
    """Everything in the weight files, units in their largest options."""
    index, copies = job.checkpoint.index, job.skeleton.stored_copies()
    replaced = _replaced(job, units)
    tensors: list[Tensor] = []
    for name, info in index.items():
        if name in replaced:
            tensors += _packed(*replaced[name], _NAMES[str(info.dtype).removeprefix("torch.")])
        elif name not in copies:
            tensors.append((name, _NAMES[str(info.dtype).removeprefix("torch.")], tuple(info.shape), info.nbytes))
    return tensors


def _packed(spec: LinearSpec, scheme: IntScheme, scale_dtype: str) -> list[Tensor]:
    """Name, dtype, shape and bytes of what stores a linear."""
    groups, words = scheme.groups(spec.in_features), math.ceil(spec.in_features * scheme.bits / 32)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight_packed": ("I32", (spec.out_features, words)),
        "weight_scale": (scale_dtype, (spec.out_features, groups)),
        "weight_shape": ("I64", (2,)),
    }
    if not scheme.symmetric:
        shapes["weight_zero_point"] = ("I32", (math.ceil(spec.out_features * scheme.bits / 32), groups))
    return [
        (f"{spec.name}.{local}", dtype, shape, math.prod(shape) * ELEMENT_BYTES[dtype])
        for local, (dtype, shape) in shapes.items()
    ]

"""An artifact as a plain Hugging Face model: every packed weight written out as the values it stands for.

For engines that read no packed weights, and for what compressed-tensors cannot carry (GPT-2's Conv1D, zero points of
fused experts). Tensors are decoded and written one at a time, so memory stays at one tensor.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.artifact import durable, replace
from compress.artifact.canonical import read_chunks
from compress.artifact.lock import FileLock
from compress.artifact.manifest import CONFIG_NAME, INDEX_NAME, MANIFEST_NAME, RECIPE_NAME
from compress.artifact.output import check_path, lock_path, refuse_itself, resolve_output
from compress.artifact.publish import DEFAULT_SHARD_BYTES
from compress.artifact.reader import Artifact
from compress.artifact.tensorfile import dtype_name, encode_header, file_order, natural_key, tensor_bytes
from compress.artifact.verify import require_sound
from compress.errors import UserError
from compress.formats import bitmask
from compress.formats.layouts import PACKED_SUFFIX, SCALE_SUFFIX, decoded_dtype
from compress.formats.registry import Format
from compress.formats.safetensors_header import TORCH_NAMES
from compress.models.checkpoint import Checkpoint
from compress.models.families import family_of
from compress.models.meta import build
from compress.progress import NullProgress, Progress
from compress.runtime.native_reader import LazyWeight, conv1d_linears, dense_state, packed_linears, schemes_of
from compress.types import Scheme

PROVENANCE_NAME = "compress_export.json"
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_NOT_COPIED = {CONFIG_NAME, RECIPE_NAME, INDEX_NAME}


@dataclass(frozen=True, slots=True)
class Export:
    """What was written: the directory, its tensors and the bytes of its weight files.

    kept_aside: where what was there before and was no artifact is now.
    """

    path: Path
    tensors: int
    bytes: int
    kept_aside: Path | None = None


@dataclass(frozen=True, slots=True)
class _Row:
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def export_dense(
    artifact: str | Path,
    output: str | Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    restart: bool = False,
    progress: Progress | None = None,
) -> Export:
    """Writes the artifact as a dense model directory at `output`, which appears complete or not at all.

    restart: replace what is at `output` once the new model is whole; what was no artifact is kept beside it.

    Weights get the dtype of their scales, which is the source's; blocks of floats bfloat16, which holds them exactly.
    `compress_export.json` names the artifact. Where the artifact rounds inputs too, the export keeps the rounding of
    the weights alone.

    Raises:
        UserError: no artifact there, or `output` holds something.
        IntegrityError: the artifact is damaged.
        WorkError: it cannot be written.
    """
    source = Artifact.open(artifact)
    target = resolve_output(output)
    check_path(target)
    refuse_itself(source.path, target)
    _refuse_occupied(target, output, restart)
    require_sound(source.path)
    checkpoint = Checkpoint.open(source.path)
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    weights: Mapping[str, LazyWeight]
    format: Format | None = None
    if "quantization_config" in checkpoint.config:
        format = packed_linears(checkpoint)[0]
        conv1d = conv1d_linears(build(config, family_of(config.get("model_type")), torch.float32))
        weights, schemes = dense_state(checkpoint, conv1d), schemes_of(checkpoint)
    else:
        conv1d, schemes, weights = set(), {}, {name: LazyWeight(checkpoint, name) for name in checkpoint.index}
    rows = [_row(checkpoint, name, conv1d, schemes, weights, format) for name in sorted(weights, key=natural_key)]
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_path(target), target)
    try:
        beside = target.with_name(f".{target.name}.export")
        _remove_unfinished(beside, source)
        durable.make_directory(beside)
        _write_provenance(beside, source)
        size = _write_weights(beside, rows, weights, max_shard_bytes, progress or NullProgress())
        _write_rest(beside, source, config)
        durable.fsync_dir(beside)
        kept = replace.put(beside, target, allowed=restart)
        if beside.exists():  # the artifact that was replaced
            durable.remove_tree(beside, last=MANIFEST_NAME)
    finally:
        lock.release()
    return Export(target, len(rows), size, kept)


def _refuse_occupied(target: Path, output: str | Path, restart: bool) -> None:
    if target.exists() and any(target.iterdir()) and not restart:
        raise UserError(f"output {output} already holds something", "give another --output, or --restart to replace it")


def _remove_unfinished(beside: Path, source: Artifact) -> None:
    """Removes what an interrupted export left, told by its first file, compress_export.json, and by its names.

    Raises UserError, having removed nothing, where anything else is there.
    """
    if not beside.exists() and not beside.is_symlink():
        return
    written = {PROVENANCE_NAME, CONFIG_NAME, INDEX_NAME, *source.manifest.files}
    ours = beside.is_dir() and not beside.is_symlink()
    if ours and (entries := list(beside.iterdir())):
        ours = any(entry.name == PROVENANCE_NAME for entry in entries)
        ours &= all(entry.is_file() and (entry.name in written or _SHARD.fullmatch(entry.name)) for entry in entries)
    if not ours:
        raise UserError(f"{beside} is in the way: no export wrote it", "move it away, or give another --output")
    durable.remove_tree(beside, last=PROVENANCE_NAME)


def _row(
    checkpoint: Checkpoint,
    name: str,
    conv1d: Collection[str],
    schemes: Mapping[str, Scheme],
    weights: Mapping[str, LazyWeight],
    format: Format | None,
) -> _Row:
    """Layout of one dense tensor; of compressed-tensors it is known without decoding."""
    if format is not None and format.name != "compressed-tensors" and weights[name].packed:
        dense = weights[name][...]
        # ModelOpt's float32 scales are wider than the weights that they stand for.
        dtype = model_dtype(checkpoint) if dense.dtype == torch.float32 else dense.dtype
        return _Row(name, dtype_name(torch.empty(0, dtype=dtype)), tuple(dense.shape), dense.numel() * dtype.itemsize)
    linear = name.removesuffix(".weight")
    scheme = schemes.get(linear) if name.endswith(".weight") else None
    if (values := checkpoint.index.get(f"{linear}.{bitmask.VALUES}")) is not None:
        dtype, shape = values.dtype, tuple(int(extent) for extent in checkpoint.read(f"{linear}.weight_shape"))
    elif scheme is None:
        dtype, shape = checkpoint.index[name].dtype, tuple(checkpoint.index[name].shape)
    else:
        dtype = decoded_dtype(scheme, checkpoint.index[linear + SCALE_SUFFIX].dtype)
        shape = _shape(checkpoint, linear, scheme)
        shape = shape[::-1] if linear in conv1d else shape
    return _Row(name, dtype_name(torch.empty(0, dtype=dtype)), shape, math.prod(shape) * dtype.itemsize)


def _shape(checkpoint: Checkpoint, linear: str, scheme: Scheme) -> tuple[int, ...]:
    """(out, in) of a quantised weight."""
    if f"{linear}.weight_shape" in checkpoint.index:
        return tuple(int(extent) for extent in checkpoint.read(f"{linear}.weight_shape"))
    if (codes := checkpoint.index.get(linear + PACKED_SUFFIX)) is not None:
        return (codes.shape[0], codes.shape[1] * 8 // scheme.bits)
    return tuple(checkpoint.index[f"{linear}.weight"].shape)


def model_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What most of a checkpoint that is not packed is stored in: the dtype of its largest floating tensor."""
    wide = [info for info in checkpoint.index.values() if info.dtype.is_floating_point and info.dtype.itemsize > 1]
    return max(wide, key=lambda info: info.nbytes).dtype


def _write_weights(
    directory: Path, rows: Sequence[_Row], weights: Mapping[str, LazyWeight], max_shard_bytes: int, progress: Progress
) -> int:
    """Writes the shards, and their index where there are several; returns the bytes of the shards."""
    shards: list[list[_Row]] = [[]]
    for row in rows:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + row.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(row)
    written, where = 0, {}
    progress.begin("writing dense weights", len(rows))
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        ordered = sorted(shard, key=lambda row: file_order(row.dtype, row.name))
        written += durable.write_stream(directory / name, _bytes(ordered, weights, progress))[1]
        where.update(dict.fromkeys((row.name for row in shard), name))
    progress.end()
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(row.nbytes for row in rows)}, "weight_map": dict(sorted(where.items()))}
        durable.write_bytes(directory / INDEX_NAME, (json.dumps(index, indent=2) + "\n").encode())
    return written


def _bytes(rows: Sequence[_Row], weights: Mapping[str, LazyWeight], progress: Progress) -> Iterator[durable.Buffer]:
    yield encode_header((row.name, row.dtype, row.shape, row.nbytes) for row in rows)
    for row in rows:
        yield tensor_bytes(weights[row.name][...].to(getattr(torch, TORCH_NAMES[row.dtype])))
        progress.advance(row.name)


def _write_rest(directory: Path, source: Artifact, config: Mapping[str, Any]) -> None:
    """config.json without the quantisation, and the source's other files."""
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    durable.write_bytes(directory / CONFIG_NAME, text.encode())
    for name in source.manifest.files:
        if name not in _NOT_COPIED and not name.endswith(".safetensors"):
            durable.write_stream(directory / name, read_chunks(source.path / name))


def _write_provenance(directory: Path, source: Artifact) -> None:
    """Where the weights come from; written first, because an unfinished export is known by it."""
    provenance = {
        "format": "dense",
        "artifact_id": source.artifact_id,
        "method": source.method,
        "scheme": source.scheme,
        "parents": [parent.model_dump(mode="json") for parent in source.manifest.parents],
    }
    durable.write_bytes(directory / PROVENANCE_NAME, (json.dumps(provenance, indent=2) + "\n").encode())

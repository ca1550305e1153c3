"""Merge the parts of a run into weight files, copying bytes: nothing is loaded, and memory stays at a few MiB."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.artifact import durable
from compress.artifact.manifest import INDEX_NAME, FileRecord, TensorRecord
from compress.artifact.tensorfile import StoredTensor, encode_header, file_order, natural_key, read_header
from compress.errors import IntegrityError

Part = tuple[Path, Mapping[str, Mapping[str, Any]]]


def assemble(
    directory: Path,
    parts: Sequence[Part],
    max_shard_bytes: int,
    replaced: Mapping[Path, Collection[str]] | None = None,
) -> tuple[dict[str, TensorRecord], dict[str, FileRecord]]:
    """Write every tensor of `parts` (file, records as `write_part` gave them) into weight files in `directory`.

    One `model.safetensors` where it fits in `max_shard_bytes`, else numbered shards and their index; a tensor larger
    than that has a shard of its own. Each tensor's hash is checked on the way. The bytes depend only on the tensors
    and `max_shard_bytes`. Returns the records of the tensors and of the files written. Raises IntegrityError if a
    part is damaged or two parts hold the same tensor, unless `replaced` names it as out of date in one of them.
    """
    stored, expected = _index(parts, replaced or {})
    shards = _split(sorted(stored, key=natural_key), stored, max_shard_bytes)
    tensors: dict[str, TensorRecord] = {}
    files: dict[str, FileRecord] = {}
    for number, names in enumerate(shards, start=1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        ordered = sorted(names, key=lambda name: file_order(stored[name].dtype, name))
        sha256, size = durable.write_stream(directory / file, _shard_bytes([stored[n] for n in ordered], expected))
        files[file] = FileRecord(sha256=sha256, bytes=size)
        for name in ordered:
            tensor = stored[name]
            tensors[name] = TensorRecord(dtype=tensor.dtype, shape=list(tensor.shape), sha256=expected[name], file=file)
    tensors = {name: tensors[name] for name in sorted(tensors, key=natural_key)}
    if len(shards) > 1:
        files[INDEX_NAME] = _write_index(directory / INDEX_NAME, tensors, sum(t.nbytes for t in stored.values()))
    return tensors, files


def _index(
    parts: Sequence[Part], replaced: Mapping[Path, Collection[str]]
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    stored: dict[str, StoredTensor] = {}
    expected: dict[str, str] = {}
    for file, records in parts:
        with durable.guarded("read", file):
            header = read_header(file)
        if set(header) != set(records):
            raise IntegrityError(f"{file} does not hold the tensors that were written to it", "use --restart")
        for name, tensor in header.items():
            if name in replaced.get(file, ()):
                continue
            if name in stored:
                raise IntegrityError(f"tensor {name} was made twice", "please report this with the recipe")
            stored[name] = tensor
            expected[name] = records[name]["sha256"]
    return stored, expected


def _split(names: Sequence[str], stored: Mapping[str, StoredTensor], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name in names:
        nbytes = stored[name].nbytes
        if shards[-1] and filled + nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    return shards


def _shard_bytes(tensors: Sequence[StoredTensor], expected: Mapping[str, str]) -> Iterator[durable.Buffer]:
    yield encode_header((t.name, t.dtype, t.shape, t.nbytes) for t in tensors)
    for tensor in tensors:
        digest = hashlib.sha256()
        for chunk in tensor.chunks():
            digest.update(chunk)
            yield chunk
        if digest.hexdigest() != expected[tensor.name]:
            raise IntegrityError(
                f"{tensor.file} was damaged after it was written (tensor {tensor.name})",
                "run the same command again: it redoes the damaged block; check the disk if this comes back",
            )


def _write_index(path: Path, tensors: Mapping[str, TensorRecord], total: int) -> FileRecord:
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: record.file for name, record in sorted(tensors.items())},
    }
    data = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
    return FileRecord(sha256=durable.write_bytes(path, data), bytes=len(data))

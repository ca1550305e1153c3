"""The header of a safetensors file, checked before anything is believed.

A shard may be truncated by a full disk or an interrupted download, and a hostile one may claim anything, so
every claim is held against the file's real size: length prefix, JSON, dtypes, shapes, and byte ranges that
must tile the data section without holes or overlaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.errors import IntegrityError, UserError

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""Safetensors dtype names and their torch dtypes (all of whole bytes)."""

MAX_HEADER_BYTES = 100_000_000
_HINT = "the file is truncated or damaged: download or copy it again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `shard` is the file's name, `offset` its first byte counted from the file's start."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    shard: str
    offset: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Name -> place of every tensor in one safetensors file, in file order.

    Raises IntegrityError naming the file and the broken rule; UserError where the file cannot be opened.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise _damaged(path, f"its header claims {length} bytes and the file has {size}")
            raw = file.read(length)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    infos = [_entry(path, name, entry, start=8 + length) for name, entry in header.items()]
    return {info.name: info for info in _tiled(path, infos, start=8 + length, end=size)}


def _entry(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    """One header entry, with its own claims checked against each other."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"the entry of {name!r} is not dtype, shape and data_offsets")
    if not name.isprintable():
        raise _damaged(path, f"the name {name!r} is not printable text")
    dtype = DTYPES.get(str(entry["dtype"]))
    if dtype is None:
        raise _damaged(path, f"{name!r} has the unknown dtype {entry['dtype']!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _damaged(path, f"{name!r} has the impossible shape {shape!r} or data_offsets {offsets!r}")
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise _damaged(path, f"{name!r} of {nbytes} bytes claims the range {offsets[0]}..{offsets[1]}")
    return TensorInfo(name, dtype, tuple(shape), nbytes, path.name, start + offsets[0])


def _tiled(path: Path, infos: Iterable[TensorInfo], start: int, end: int) -> list[TensorInfo]:
    """The entries by position, which must cover start..end exactly."""
    ordered = sorted(infos, key=lambda info: (info.offset, info.nbytes))
    position = start
    for info in ordered:
        if info.offset != position:
            raise _damaged(path, f"{info.name!r} starts at byte {info.offset} where byte {position} is due")
        position += info.nbytes
    if position != end:
        raise _damaged(path, f"its tensors end at byte {position} and the file has {end}")
    return ordered


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _damaged(path: Path, reason: str) -> IntegrityError:
    return IntegrityError(f"{path} is not a sound safetensors file: {reason}", _HINT)

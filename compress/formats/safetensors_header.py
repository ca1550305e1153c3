"""The header of a safetensors file, checked before anything is believed. Free of torch.

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

from compress.errors import IntegrityError, UserError

_BY_WIDTH = {
    8: "F64 float64, I64 int64, U64 uint64, C64 complex64",
    4: "F32 float32, I32 int32, U32 uint32",
    2: "F16 float16, BF16 bfloat16, I16 int16, U16 uint16",
    1: "I8 int8, U8 uint8, BOOL bool, F8_E4M3 float8_e4m3fn, F8_E5M2 float8_e5m2, F8_E8M0 float8_e8m0fnu",
}
_DTYPES: list[tuple[int, str, str]] = [
    (width, pair.split()[0], pair.split()[1]) for width, pairs in _BY_WIDTH.items() for pair in pairs.split(", ")
]
ELEMENT_BYTES: dict[str, int] = {name: width for width, name, _ in _DTYPES}
"""Bytes per element of every dtype, by its safetensors name."""
TORCH_NAMES: dict[str, str] = {name: torch_name for _, name, torch_name in _DTYPES}
"""The torch name of every dtype, by its safetensors name."""

MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: `start` and `nbytes` in bytes, counted from the file's start; dtype as the file says."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(path: Path) -> dict[str, Entry]:
    """Name -> place of every tensor in one safetensors file, in file order.

    Raises IntegrityError naming the file and the broken rule; UserError where the file cannot be opened.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise damaged(path, f"its header claims {length} bytes and the file has {size}")
            raw = file.read(length)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    entries = [_entry(path, name, entry, start=8 + length) for name, entry in header.items()]
    return {one.name: one for one in _tiled(path, entries, start=8 + length, end=size)}


def _entry(path: Path, name: str, entry: Any, start: int) -> Entry:
    """One header entry, with its own claims checked against each other."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, f"the entry of {name!r} is not dtype, shape and data_offsets")
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
        raise damaged(path, f"{name!r} has the unknown dtype {dtype!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise damaged(path, f"{name!r} has the impossible shape {shape!r} or data_offsets {offsets!r}")
    nbytes = math.prod(shape) * ELEMENT_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise damaged(path, f"{name!r} of {nbytes} bytes claims the range {offsets[0]}..{offsets[1]}")
    return Entry(name, dtype, tuple(shape), start + offsets[0], nbytes)


def _tiled(path: Path, entries: Iterable[Entry], start: int, end: int) -> list[Entry]:
    """The entries by position, which must cover start..end exactly."""
    ordered = sorted(entries, key=lambda one: (one.start, one.nbytes))
    position = start
    for one in ordered:
        if one.start != position:
            raise damaged(path, f"{one.name!r} starts at byte {one.start} where byte {position} is due")
        position += one.nbytes
    if position != end:
        raise damaged(path, f"its tensors end at byte {position} and the file has {end}")
    return ordered


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def damaged(path: Path, reason: str) -> IntegrityError:
    """What to raise about a file that breaks a rule."""
    return IntegrityError(f"{path} is damaged: {reason}", "make, copy or download it again")

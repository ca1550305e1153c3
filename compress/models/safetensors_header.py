"""The tensors of a checkpoint's shard, with torch dtypes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from compress.formats import safetensors_header
from compress.formats.safetensors_header import TORCH_NAMES

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, torch_name) for name, torch_name in TORCH_NAMES.items()}
"""Safetensors dtype names and their torch dtypes (all of whole bytes)."""


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
    """As `compress.formats.safetensors_header.read_header`; names that no terminal can show are refused as well."""
    entries = safetensors_header.read_header(path)
    for name in entries:
        if not name.isprintable():
            raise safetensors_header.damaged(path, f"the name {name!r} is not printable text")
    return {
        name: TensorInfo(name, DTYPES[entry.dtype], entry.shape, entry.nbytes, path.name, entry.start)
        for name, entry in entries.items()
    }

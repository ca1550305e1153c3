"""safetensors files as bytes: streamed writing, and copying without loading.

The safetensors library builds a whole file in memory to write it. A shard here is written tensor by tensor from
pieces of at most 4 MiB, so that assembling an artifact costs no anonymous memory to speak of, and its bytes
depend on the tensors alone: fixed metadata, tensors ordered by element size (wide first, which keeps every
tensor aligned) and then by name.
"""

from __future__ import annotations

import json
import mmap
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.artifact import durable
from compress.artifact.canonical import CHUNK_BYTES, sha256_bytes
from compress.errors import IntegrityError
from compress.formats import safetensors_header
from compress.formats.safetensors_header import ELEMENT_BYTES, TORCH_NAMES

if TYPE_CHECKING:
    import torch

METADATA = {"format": "pt"}
_NAMES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: `start` and `nbytes` are in bytes from the start of `file`."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def chunks(self) -> Iterator[memoryview]:
        """Its bytes in pieces; each piece is valid only until the next one is asked for."""
        buffer = memoryview(bytearray(min(CHUNK_BYTES, self.nbytes)))
        left = self.nbytes
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            while left:
                count = file.readinto(buffer[: min(left, len(buffer))])
                if not count:
                    raise IntegrityError(
                        f"{self.file} ends inside tensor {self.name}", "the file was cut short; make or fetch it again"
                    )
                left -= count
                yield buffer[:count]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, in file order. Raises as `formats.safetensors_header.read_header`."""
    return {
        name: StoredTensor(path, name, entry.dtype, entry.shape, entry.start, entry.nbytes)
        for name, entry in safetensors_header.read_header(path).items()
    }


def file_order(dtype: str, name: str) -> tuple[int, str]:
    """Sort key of a tensor within a file."""
    return (-ELEMENT_BYTES[dtype], name)


def encode_header(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """The leading bytes of a file holding `(name, dtype, shape, nbytes)` in this order, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": METADATA}
    position = 0
    for name, dtype, shape, nbytes in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def dtype_name(tensor: torch.Tensor) -> str:
    """The safetensors name of a tensor's dtype. Raises IntegrityError for a dtype the format cannot hold."""
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in _NAMES:
        raise IntegrityError(f"a tensor of dtype {name} cannot be stored", "store it in a dtype safetensors knows")
    return _NAMES[name]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The little-endian bytes of a tensor, without a copy where it is contiguous and on the CPU."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, dict[str, Any]], str]:
    """Write and fsync a safetensors file, one tensor in memory at a time.

    Returns `{name: {dtype, shape, sha256, nbytes}}` in file order, and the SHA-256 of the file. Raises WorkError
    if it cannot be written.
    """
    rows = sorted(
        ((name, dtype_name(t), tuple(t.shape), t.numel() * t.element_size()) for name, t in tensors.items()),
        key=lambda row: file_order(row[1], row[0]),
    )
    records: dict[str, dict[str, Any]] = {}

    def chunks() -> Iterator[durable.Buffer]:
        yield encode_header(rows)
        for name, dtype, shape, nbytes in rows:
            data = tensor_bytes(tensors[name])
            records[name] = {"dtype": dtype, "shape": list(shape), "sha256": sha256_bytes(data), "nbytes": nbytes}
            yield data

    sha256, _ = durable.write_stream(path, chunks())
    return records, sha256


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file, mapped copy-on-write: pages come from the page cache until something writes to them."""
    import torch

    dtypes = {name: getattr(torch, torch_name) for name, torch_name in TORCH_NAMES.items()}
    entries = read_header(path)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    loaded = {}
    for name, entry in entries.items():
        dtype = dtypes[entry.dtype]
        if entry.nbytes == 0:
            loaded[name] = torch.empty(entry.shape, dtype=dtype)
            continue
        count = entry.nbytes // dtype.itemsize
        loaded[name] = torch.frombuffer(mapped, dtype=dtype, count=count, offset=entry.start).reshape(entry.shape)
    return loaded


_NUMBER = re.compile(r"(\d+)")


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts `layers.2` before `layers.10`, so that a block's tensors stay together."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in _NUMBER.split(name) if part)

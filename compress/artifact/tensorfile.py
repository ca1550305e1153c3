"""safetensors files as bytes: a checked header, streamed writing, and copying without loading.

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

if TYPE_CHECKING:
    import torch

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
_TORCH_NAMES: dict[str, str] = {torch_name: name for _, name, torch_name in _DTYPES}
METADATA = {"format": "pt"}
_MAX_HEADER_BYTES = 100_000_000


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
    """The tensors of a safetensors file by name, in file order.

    Raises IntegrityError if the header is damaged, a tensor's size does not follow from its dtype and shape, or
    the tensors do not cover the rest of the file exactly.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 0 < length <= min(_MAX_HEADER_BYTES, size - 8):
            raise _damaged(path, "its header length makes no sense")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = [_entry(path, name, value, 8 + length) for name, value in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    position = 8 + length
    for tensor in tensors:
        if tensor.start != position:
            raise _damaged(path, f"tensor {tensor.name} starts at byte {tensor.start}, expected {position}")
        position += tensor.nbytes
    if position != size:
        raise _damaged(path, f"its header describes {position} bytes, the file has {size}")
    return {tensor.name: tensor for tensor in tensors}


def _entry(path: Path, name: str, value: Any, base: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        width = ELEMENT_BYTES[dtype]
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError):
        raise _damaged(path, f"the header entry of tensor {name} makes no sense") from None
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise _damaged(path, f"the header entry of tensor {name} has a bad number")
    count = width
    for extent in shape:
        count *= extent
    if end - begin != count:
        raise _damaged(path, f"tensor {name} is {dtype} {list(shape)} but {end - begin} bytes long")
    return StoredTensor(path, name, dtype, tuple(shape), base + begin, count)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _damaged(path: Path, what: str) -> IntegrityError:
    return IntegrityError(f"{path} is damaged: {what}", "make or fetch the file again")


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
    if name not in _TORCH_NAMES:
        raise IntegrityError(f"a tensor of dtype {name} cannot be stored", "store it in a dtype safetensors knows")
    return _TORCH_NAMES[name]


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

    dtypes = {name: getattr(torch, torch_name) for torch_name, name in _TORCH_NAMES.items()}
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

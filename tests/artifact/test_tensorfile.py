"""safetensors by hand: the owner library reads what we write and we read what it writes; damage is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compress.artifact.canonical import sha256_file
from compress.artifact.tensorfile import load_tensors, natural_key, read_header, write_tensors
from compress.errors import IntegrityError

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.complex64),
]


def example(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Random bytes seen as `dtype` (zeros and ones for booleans)."""
    count = dtype.itemsize
    for extent in shape:
        count *= extent
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=torch.Generator().manual_seed(seed))
    return data.to(torch.uint8).view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and bytes."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)] if a.numel() else []
    return not flat or torch.equal(*flat)


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")
tensors = st.dictionaries(
    names,
    st.builds(
        example,
        st.sampled_from(DTYPES),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
        st.integers(0, 1000),
    ),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(written=tensors)
def test_the_owner_library_reads_what_we_write(tmp_path_factory: pytest.TempPathFactory, written: Any) -> None:
    path = tmp_path_factory.mktemp("t") / "t.safetensors"
    records, sha256 = write_tensors(path, written)
    assert sha256 == sha256_file(path)
    theirs, ours = load_file(path), load_tensors(path)
    assert set(theirs) == set(ours) == set(records) == set(written)
    for name, tensor in written.items():
        assert same(theirs[name], tensor)
        assert same(ours[name], tensor)


@settings(max_examples=40, deadline=None)
@given(written=tensors)
def test_we_read_what_the_owner_library_writes(tmp_path_factory: pytest.TempPathFactory, written: Any) -> None:
    path = tmp_path_factory.mktemp("t") / "t.safetensors"
    save_file(written, path)
    assert all(same(tensor, written[name]) for name, tensor in load_tensors(path).items())
    assert set(read_header(path)) == set(written)


def test_the_bytes_do_not_depend_on_the_order_given(tmp_path: Path) -> None:
    one = {"b": torch.ones(3, dtype=torch.int8), "a": torch.ones(2), "c": torch.ones(2)}
    write_tensors(tmp_path / "1", one)
    write_tensors(tmp_path / "2", dict(reversed(one.items())))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert list(read_header(tmp_path / "1")) == ["a", "c", "b"]


def test_a_dtype_that_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="complex128"):
        write_tensors(tmp_path / "t", {"a": torch.zeros(2, dtype=torch.complex128)})


def raw(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def one(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"", b""),
        (b"{", b""),
        (b"\xff\xfe", b""),
        ([], b""),
        ({"a": 1}, b""),
        ({"a": {"dtype": "F32"}}, b""),
        (one(dtype="F33"), bytes(8)),
        (one(dtype=3), bytes(8)),
        (one(shape=[3]), bytes(8)),
        (one(shape=[-2]), bytes(8)),
        (one(shape=[2.0]), bytes(8)),
        (one(shape=[True, 2]), bytes(8)),
        (one(shape=None), bytes(8)),
        (one(offsets=[4, 12]), bytes(12)),
        (one(offsets=[8, 0]), bytes(8)),
        (one(offsets=[0]), bytes(8)),
        (one(), bytes(7)),
        (one(), bytes(9)),
        ({**one(), "b": one()["a"]}, bytes(8)),
        (b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "a": 1}', b""),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, data: bytes) -> None:
    path = raw(tmp_path / "t", header, data)
    with pytest.raises(IntegrityError, match="is damaged"):
        read_header(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_tensors(path, {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.int8)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(IntegrityError):
            read_header(path)


def test_a_header_length_beyond_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(IntegrityError, match="its header claims"):
        read_header(tmp_path / "t")


def test_natural_order_keeps_blocks_together() -> None:
    listed = ["layers.10.a", "layers.2.b", "layers.2.a", "lm_head", "layers.a", "embed"]
    assert sorted(listed, key=natural_key) == [
        "embed",
        "layers.2.a",
        "layers.2.b",
        "layers.10.a",
        "layers.a",
        "lm_head",
    ]

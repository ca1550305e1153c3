"""The packed form of weights with many zeros: exact, as small as it says, and checked on reading."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import IntegrityError
from compress.formats import bitmask


def sparse(rows: int, columns: int, share: float, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """A random weight with about this share of zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight.masked_fill(torch.rand(rows, columns, generator=generator) < share, 0.0).to(dtype)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 100),
)
def test_what_is_packed_comes_back_bit_for_bit(
    rows: int, columns: int, share: float, dtype: torch.dtype, seed: int
) -> None:
    weight = sparse(rows, columns, share, dtype, seed)
    stored = bitmask.pack(weight)
    assert torch.equal(bitmask.unpack(stored), weight)
    assert bitmask.unpack(stored).dtype == dtype
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert bitmask.smaller(weight) == (size < weight.numel() * weight.element_size())


def test_half_zeros_take_nine_bits_of_sixteen() -> None:
    weight = sparse(256, 512, 0.0)
    weight[:, ::2] = 0
    size = sum(tensor.numel() * tensor.element_size() for tensor in bitmask.pack(weight).values())
    assert size == weight.numel() * 9 // 8 + 16


def test_the_bits_are_where_the_format_says() -> None:
    stored = bitmask.pack(torch.tensor([[0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0, 4.0, 0.0]]))
    assert stored["weight_bitmask"].tolist() == [[0b10000010, 0b00000001]]
    assert stored["weight_values"].tolist() == [2.0, 3.0, 4.0]
    assert stored["weight_shape"].tolist() == [1, 10]


def test_parts_that_contradict_each_other_are_refused() -> None:
    stored = bitmask.pack(sparse(4, 20, 0.5))
    with pytest.raises(IntegrityError, match="weight_values is missing"):
        bitmask.unpack({name: tensor for name, tensor in stored.items() if name != "weight_values"})
    with pytest.raises(IntegrityError, match="does not fit the shape"):
        bitmask.unpack({**stored, "weight_shape": torch.tensor([4, 40])})
    with pytest.raises(IntegrityError, match="marks"):
        bitmask.unpack({**stored, "weight_values": stored["weight_values"][1:]})
    beyond = stored["weight_bitmask"].clone()
    beyond[0, -1] |= 0b10000000  # a bit behind the last column
    values = torch.cat([stored["weight_values"], torch.ones(1, dtype=torch.bfloat16)])
    with pytest.raises(IntegrityError, match="marks"):
        bitmask.unpack({**stored, "weight_bitmask": beyond, "weight_values": values})

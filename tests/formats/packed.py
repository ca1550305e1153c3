"""Random quantised weights and words, for the tests of every format."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.types import IntScheme, QuantizedTensor


def signed(words: list[int]) -> list[int]:
    """Words as int32 has them."""
    return [word - (1 << 32) if word >> 31 else word for word in words]


def random_codes(bits: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), shape, generator=generator, dtype=torch.int8)


def random_weight(
    bits: int, out: int, groups: int, size: int, symmetric: bool, seed: int = 0, dtype: torch.dtype = torch.float32
) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    scale = (torch.rand(out, groups, generator=generator) + 0.01).to(dtype)
    zero = None if symmetric else random_codes(bits, out, groups, seed=seed + 1)
    return QuantizedTensor(
        random_codes(bits, out, groups * size, seed=seed), scale, zero, IntScheme(bits, size, symmetric)
    )

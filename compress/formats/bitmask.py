"""`sparse-bitmask`: of a weight with many zeros, one bit per weight that says where it is not zero, and what is not.

    weight_bitmask   (rows, ceil(columns / 8)) uint8, column 8 k + b in bit b of byte k; bits past the last column are 0
    weight_values    (count,) in the weight's dtype, in the order of rows
    weight_shape     (2,) int64

The layout of compressed-tensors' format of that name, which compressed-tensors 0.20 names and does not read any more.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.errors import IntegrityError

FORMAT = "sparse-bitmask"
MASK, VALUES, SHAPE = "weight_bitmask", "weight_values", "weight_shape"
PARTS = (MASK, VALUES, SHAPE)
MASK_SUFFIX = f".{MASK}"
HINT = "run `compress verify` on the artifact"


def smaller(weight: Tensor) -> bool:
    """Whether the format takes less room than the dense weight (rows, columns)."""
    rows, columns = weight.shape
    stored = stored_bytes(rows, columns, int((weight != 0).sum()), weight.element_size())
    return stored < weight.numel() * weight.element_size()


def stored_bytes(rows: int, columns: int, nonzero: int, itemsize: int) -> int:
    """What a weight of so many values takes of which so many are not zero."""
    return rows * -(-columns // 8) + nonzero * itemsize + 16


def pack(weight: Tensor) -> dict[str, Tensor]:
    """The stored tensors of a weight (rows, columns), by local name."""
    rows, columns = weight.shape
    stays = weight != 0
    padded = torch.zeros(rows, -(-columns // 8) * 8, dtype=torch.uint8)
    padded[:, :columns] = stays
    mask = (padded.reshape(rows, -1, 8) << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return {MASK: mask, VALUES: weight[stays].contiguous(), SHAPE: torch.tensor([rows, columns])}


def unpack(stored: Mapping[str, Tensor]) -> Tensor:
    """The weight (rows, columns) of `pack`'s tensors.

    Raises:
        IntegrityError: a tensor is missing, or they contradict each other.
    """
    if missing := [name for name in PARTS if name not in stored]:
        raise IntegrityError(f"{missing[0]} is missing", HINT)
    mask, values = stored[MASK], stored[VALUES]
    rows, columns = (int(extent) for extent in stored[SHAPE])
    if mask.dtype != torch.uint8 or tuple(mask.shape) != (rows, -(-columns // 8)):
        raise IntegrityError(
            f"{MASK} does not fit the shape {rows} x {columns}", "run `compress verify` on the artifact"
        )
    bits = ((mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).bool().reshape(rows, -1)
    stays = bits[:, :columns]
    if int(bits.sum()) != values.numel() or int(stays.sum()) != values.numel():
        raise IntegrityError(
            f"{MASK} marks {int(bits.sum())} weights and {VALUES} holds {values.numel()}",
            HINT,
        )
    weight = torch.zeros(rows, columns, dtype=values.dtype)
    weight[stays] = values
    return weight

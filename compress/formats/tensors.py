"""What packing in every format shares: checks of stored tensors, and changes of dtype that lose nothing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.errors import IntegrityError

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of the tensors that a linear stores, by local name."""

HINT = "run `compress verify` on the artifact"


def fetch(
    stored: Mapping[str, Tensor],
    name: str,
    ndim: int,
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A stored tensor.

    Raises:
        IntegrityError: it is missing, or not of these dimensions, shape or dtype.
    """
    tensor = stored.get(name)
    if tensor is None:
        raise IntegrityError(f"quantised weight lacks {name!r}", HINT)
    fits = tensor.ndim == ndim and (shape is None or tuple(tensor.shape) == shape)
    if not fits or (dtype is not None and tensor.dtype != dtype):
        wanted = f"{ndim} dimensions" if shape is None else f"{dtype} {shape}"
        raise IntegrityError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, the scheme needs {wanted}", HINT)
    return tensor


def positive(stored: Mapping[str, Tensor], name: str) -> Tensor:
    """A stored number that can be divided by. IntegrityError where it is missing or none."""
    tensor = stored.get(name)
    if tensor is None or tensor.numel() != 1 or not 0 < float(tensor) < float("inf"):
        raise IntegrityError(f"{name} is not one positive number", HINT)
    return tensor


def is_exact(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether every value is a number of `dtype`."""
    return torch.equal(values.to(dtype).double(), values.double())


def exact(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in `dtype`. IntegrityError where one is none of its numbers: callers ask `is_exact` first."""
    if not is_exact(values, dtype):
        raise IntegrityError(f"a scale of {values.dtype} is no number of {dtype}", "please report this with the recipe")
    return values.to(dtype)

"""The pool of threads does every piece of work, whatever their number, and however threads come and go."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from compress.kernels import packed_linear

BUNDLE = 64
"""Rows that are one piece of work."""


def product(linear: Any, x: Tensor, threads: int) -> Tensor:
    """Outputs (tokens, rows), NaN where nobody wrote."""
    out = torch.full((x.shape[0], linear.rows), torch.nan)
    linear.multiply(x, out, False, threads)
    return out


def test_every_piece_is_done() -> None:
    """Calls one after the other, of few and of many pieces, with fewer and more threads than before and than cores."""
    weights = [torch.randn(BUNDLE * pieces - 5, 32) for pieces in (2, 3, 7, 31, 64)]
    linears = [packed_linear.pack_dense(weight) for weight in weights]
    x = torch.randn(1, 32)
    expected = [product(linear, x, 1) for linear in linears]
    for number in range(4000):
        which, threads = number * 7 % len(linears), 1 + number * 5 % 6
        assert torch.equal(product(linears[which], x, threads), expected[which])


def test_threads_that_slept_come_back() -> None:
    linear, x = packed_linear.pack_dense(torch.randn(BUNDLE * 40, 64)), torch.randn(2, 64)
    expected = product(linear, x, 1)
    for pause in (0.0, 0.0002, 0.005, 0.02):  # spinning, yielding, asleep
        for _ in range(5):
            time.sleep(pause)
            assert torch.equal(product(linear, x, 3), expected)


def test_more_pieces_than_a_share_can_count() -> None:
    """Packing deals out strips of 16 rows: beyond 65,535 of them, several are one piece."""
    rows = 16 * 70_000 + 3
    weight = torch.randn(rows, 1).expand(rows, 2).contiguous()
    linear = packed_linear.pack_dense(weight, threads=3)
    found = product(linear, torch.ones(1, 2), 3)
    assert torch.equal(found[0], 2 * weight[:, 0])

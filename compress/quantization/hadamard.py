"""Rotations fused into weights: R1 and R2 of QuaRot (arXiv:2404.00456) and SpinQuant (arXiv:2405.16406).

A decoder with RMS norms computes the same when its residual stream x is replaced by x R, R orthogonal: what writes to
the stream is multiplied by R, what reads from it by R^T, and a norm's gain goes into the linears behind it first. The
values and outputs of a head may be rotated likewise. Outliers, which sit in a few channels, are spread over all.

R = diag(signs) H / sqrt(n): H a Hadamard matrix, Sylvester's of order 2^k times one of Paley's where n is no power of
two (section 3.1 of QuaRot has tables instead); the signs are drawn from the seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS_AT_A_TIME = 256  # float64 copies of so many rows at a time, so that a vocabulary's are never held


def order(n: int) -> tuple[int, int] | None:
    """(m, 2^k) with m 2^k = n and a Hadamard matrix of order m known here (1, or Paley's); None where there is none."""
    power = n & -n
    while power:
        m = n // power
        if m in (1, 2) or _paley(m):
            return m, power
        power //= 2
    return None


def _paley(m: int) -> int:
    """1 or 2: which of Paley's constructions has order m over a prime; 0 for neither."""
    if m % 4:
        return 0
    if _prime(m - 1) and (m - 1) % 4 == 3:
        return 1
    return 2 if _prime(m // 2 - 1) and (m // 2 - 1) % 4 == 1 else 0


def _prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def matrix(m: int) -> Tensor:
    """A Hadamard matrix (m, m) float64 of order 1, 2 or one of Paley's."""
    if m <= 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:m, :m]
    kind = _paley(m)
    assert kind, "`order` knows which there are"
    q = m - 1 if kind == 1 else m // 2 - 1
    squares = {i * i % q for i in range(1, q)}
    residues = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    places = torch.arange(q)
    core[1:, 1:] = residues[(places[:, None] - places) % q]
    core[0, 1:] = 1.0
    core[1:, 0] = -1.0 if kind == 1 else 1.0
    eye = torch.eye(q + 1, dtype=torch.float64)
    if kind == 1:
        return core + eye
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    other = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(core, pair) + torch.kron(eye, other)


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal matrix R (size, size), never built: signs (size,) float64 and the two orders of its Hadamard."""

    signs: Tensor
    outer: Tensor
    """The Hadamard matrix (m, m) that stands outside Sylvester's."""

    @classmethod
    def random(cls, size: int, seed: int) -> Rotation:
        """The rotation of this size that the seed means. `order(size)` must not be None."""
        orders = order(size)
        assert orders is not None
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        return cls(signs, matrix(orders[0]))

    @property
    def size(self) -> int:
        return len(self.signs)

    def __call__(self, x: Tensor) -> Tensor:
        """x R for x (..., n) float64; n is a multiple of the size, and every run of `size` columns is rotated."""
        m = len(self.outer)
        inner = self.size // m
        parts = (x.unflatten(-1, (-1, self.size)) * self.signs).unflatten(-1, (m, inner))
        step = 1
        while step < inner:  # the fast Walsh-Hadamard transform
            pairs = parts.unflatten(-1, (-1, 2, step))
            first, second = pairs[..., 0, :], pairs[..., 1, :]
            parts = torch.stack((first + second, first - second), -2).flatten(-3)
            step *= 2
        if m > 1:
            parts = self.outer.T @ parts
        return parts.flatten(-2).flatten(-2) / math.sqrt(self.size)


@dataclass(frozen=True, slots=True)
class Rows:
    """Which output rows of a linear are the values: `heads` runs of `size`, every `stride` rows from `start`."""

    start: int
    heads: int
    stride: int
    size: int

    def places(self) -> Tensor:
        """(heads * size,) int64."""
        starts = self.start + torch.arange(self.heads) * self.stride
        return (starts.unsqueeze(1) + torch.arange(self.size)).reshape(-1)


@dataclass(frozen=True, eq=False)
class Turn:
    """What fusing does to one linear, or to an embedding, which is read as a linear without a gain.

    gain: (in,) float64, of the norm in front. inputs: the rotation of what it reads. outputs: of what it writes, in
    `rows` alone where given.
    """

    gain: Tensor | None = None
    inputs: Rotation | None = None
    outputs: Rotation | None = None
    rows: Rows | None = None

    def weight(self, weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """weight (out, in) as it is afterwards, in `dtype`; sums are float64."""
        turned = torch.empty(weight.shape, dtype=dtype if self.outputs is None else torch.float32)
        for source, target in zip(weight.split(ROWS_AT_A_TIME), turned.split(ROWS_AT_A_TIME), strict=True):
            target.copy_(self._read(source))
        if self.outputs is not None:
            for columns in turned.split(ROWS_AT_A_TIME, 1):
                columns.copy_(self._written(columns.T.double()).T)
        return turned.to(dtype)

    def bias(self, bias: Tensor) -> Tensor:
        """bias (out,) as it is afterwards, float32."""
        return (bias.double() if self.outputs is None else self._written(bias.double())).float()

    def _read(self, rows: Tensor) -> Tensor:
        rows = rows.double()
        if self.gain is not None:
            rows = rows * self.gain
        return rows if self.inputs is None else self.inputs(rows)

    def _written(self, outputs: Tensor) -> Tensor:
        """outputs (..., out) float64, rotated."""
        assert self.outputs is not None
        if self.rows is None:
            return self.outputs(outputs)
        places = self.rows.places()
        return outputs.index_copy(-1, places, self.outputs(outputs[..., places]))

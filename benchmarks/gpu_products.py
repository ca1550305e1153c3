"""Linears of one layer on a GPU: random weights of every scheme, their parity, and their speed against bfloat16.

Copies of a layer's linears are rotated through more than twice the L2 cache inside one CUDA graph; those of all schemes
and of torch in bfloat16 are recorded first and replayed in turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu_shapes import Linear, Shape
from benchmarks.gpu_timing import Clock, ratios, spread, summary
from compress.formats.inputs import round_inputs
from compress.kernels import gpu_linear
from compress.schemes import FIXED_SCHEMES
from compress.types import BlockFloatScheme, Fp8Scheme, IntScheme, QuantizedTensor, Scheme

SCHEMES: dict[str, Scheme] = {
    **{f"W{bits}A16-g128": IntScheme(bits, 128) for bits in (2, 3, 4, 8)},
    **{name: FIXED_SCHEMES[name] for name in ("W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16", "MXFP8A16")},
}
DENSE, COPY = "bfloat16", "copy"
Save = Callable[[], None]
"""Called when a record has grown."""


def random_weight(rows: int, columns: int, scheme: Scheme, device: torch.device) -> QuantizedTensor:
    """Random codes on grids that keep products in range."""
    if isinstance(scheme, IntScheme):
        codes = torch.randint(scheme.qmin, scheme.qmax + 1, (rows, columns), dtype=torch.int8, device=device)
        scale = torch.rand(rows, scheme.groups(columns), device=device) * 0.001 + 0.0005
        return QuantizedTensor(codes, scale if scheme.inputs else scale.bfloat16(), None, scheme)
    values = torch.randn(rows, columns, device=device)
    if isinstance(scheme, Fp8Scheme):
        scale = torch.full(scheme.scale_shape(rows, columns), 0.001, device=device)
        return QuantizedTensor((30 * values).to(torch.float8_e4m3fn), scale, None, scheme)
    assert isinstance(scheme, BlockFloatScheme)
    groups = (rows, scheme.groups(columns))
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device=device)
    codes = (4 * values).to(torch.float8_e4m3fn) if scheme.bits == 8 else codes
    if scheme.scale_type == "e8m0":
        return QuantizedTensor(codes, torch.full(groups, 119, dtype=torch.uint8, device=device), None, scheme)
    scale = torch.rand(groups, device=device).add(1).to(torch.float8_e4m3fn)
    return QuantizedTensor(codes, scale, None, scheme, torch.tensor([100.0], device=device))


def linear(rows: int, columns: int, scheme: Scheme | None, device: torch.device) -> tuple[Linear, int]:
    """A random linear, packed, or torch's in bfloat16, and the bytes that a product reads of it."""
    if scheme is None:
        weight = (torch.randn(rows, columns, device=device) * 0.02).bfloat16()
        return (lambda x: functional.linear(x, weight)), 2 * weight.numel()
    packed, _ = gpu_linear.pack(random_weight(rows, columns, scheme, device), None, None)
    return (lambda x: gpu_linear.multiply(packed, x)), packed.nbytes


class Layer:
    """Copies of a layer's linears, more than twice the L2 cache of them; `read`: bytes of weights of one copy."""

    def __init__(self, shape: Shape, scheme: Scheme | None, clock: Clock) -> None:
        self._device = clock.device
        self._copies: list[list[tuple[Linear, int]]] = []
        self.read = 0
        while self.read * len(self._copies) <= 2 * clock.l2_bytes() or len(self._copies) < 2:
            made = [
                (linear(rows, columns, scheme, clock.device), columns) for rows, columns in shape.linears().values()
            ]
            self.read = sum(size for (_, size), _ in made)
            self._copies.append([(one, columns) for (one, _), columns in made])

    def work(self, tokens: int) -> Callable[[], object]:
        """One pass over all copies."""
        columns = {width for _, width in self._copies[0]}
        x = {width: torch.randn(tokens, width, device=self._device).bfloat16() for width in columns}
        return lambda: [one(x[width]) for copy in self._copies for one, width in copy]

    def seconds(self, taken: list[float]) -> list[float]:
        """Of one copy."""
        return [one / len(self._copies) for one in taken]


def speed(
    shape: Shape, schemes: dict[str, Scheme], tokens: tuple[int, ...], clock: Clock, found: dict[str, Any], save: Save
) -> None:
    """By number of tokens and scheme: time of a layer, against bfloat16, and share of the copy bandwidth."""
    layers = {DENSE: Layer(shape, None, clock), **{name: Layer(shape, one, clock) for name, one in schemes.items()}}
    copy, copied = clock.copy()
    for count in tokens:
        taken = clock.turns({COPY: copy, **{name: layer.work(count) for name, layer in layers.items()}})
        bandwidth = [copied / one for one in taken.pop(COPY)]
        times = {name: layers[name].seconds(one) for name, one in taken.items()}
        found[str(count)] = row = {"copy_bytes_per_second": spread(bandwidth), DENSE: summary(times[DENSE])}
        for name in schemes:
            shares = [layers[name].read / one / of for one, of in zip(times[name], bandwidth, strict=True)]
            row[name] = {
                "time": summary(times[name]),
                "times_faster_than_bfloat16": ratios(times[DENSE], times[name]),
                "weight_bytes": layers[name].read,
                "share_of_copy_bandwidth": spread(shares),
            }
        save()


def parity(shape: Shape, clock: Clock, found: dict[str, Any], save: Save) -> None:
    """Largest error of each scheme's product over the outputs' root mean square, by number of tokens."""
    rows, columns = shape.linears()["o"]
    for name, scheme in SCHEMES.items():
        weight = random_weight(rows, columns, scheme, clock.device)
        packed, rounds = gpu_linear.pack(weight, None, None)
        divisor = None if weight.divisor is None else weight.divisor.cpu()
        host = QuantizedTensor(weight.codes.cpu(), weight.scale.cpu(), None, scheme, divisor)
        dense = host.dequantize().double().to(clock.device)
        found[name] = {}
        for tokens in (1, 3) if clock.dry else (1, 2, 16, 17, 128, 512):
            x = torch.randn(tokens, columns, device=clock.device).bfloat16()
            found[name][str(tokens)] = _error(packed, x, dense, scheme if rounds else None)
        save()


def _error(packed: Any, x: Tensor, dense: Tensor, rounding: Scheme | None) -> float:
    entered = x if rounding is None or rounding.inputs is None else round_inputs(x.float(), rounding.inputs)
    wanted = entered.double() @ dense.T
    return float((gpu_linear.multiply(packed, x).double() - wanted).abs().max() / wanted.square().mean().sqrt())

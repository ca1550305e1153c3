"""Grids: ranges, rounding, error bounds, and a search that is never worse than what it starts from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.kernels.scales import stored_scale
from compress.quantization.configs import RtnConfig
from compress.quantization.grid import min_max_grid, quantize, search_grid
from compress.quantization.rtn import transform
from compress.types import IntScheme, QuantizedTensor
from tests.quantization.data import correlated, in_range, normal, objective, stats_of, values

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = ("normal", "heavy", "uniform", "positive", "zeros", "zero group", "constant", "outlier", "tiny")


def weight_of(kind: str, out: int, width: int, seed: int) -> Tensor:
    """A weight (out, in) float32 of some kind that checkpoints hold."""
    base = normal(out, width, seed=seed)
    if kind == "heavy":
        return base**3
    if kind == "uniform":
        return torch.rand(out, width, generator=torch.Generator().manual_seed(seed)) - 0.3
    if kind == "positive":
        return base.abs() + 0.5
    if kind == "zeros":
        return torch.zeros(out, width)
    if kind == "zero group":
        base[:, : width // 2] = 0
        return base
    if kind == "constant":
        return torch.full((out, width), -0.37)
    if kind == "outlier":
        base[:, 0] *= 40
        return base
    return base * 1e-6 if kind == "tiny" else base


CASES = {
    "kind": st.sampled_from(KINDS),
    "bits": st.integers(2, 8),
    "groups": st.integers(1, 4),
    "size": st.sampled_from([1, 2, 5, 16, 32]),
    "symmetric": st.booleans(),
    "dtype": st.sampled_from(DTYPES),
    "seed": st.integers(0, 1000),
}


def steps_off(weight: Tensor, quantized: QuantizedTensor) -> Tensor:
    """Error of each weight in steps of its own scale."""
    size = weight.shape[1] // quantized.scale.shape[1]
    return (weight.double() - values(quantized)).abs() / quantized.scale.double().abs().repeat_interleave(size, 1)


@settings(max_examples=200, deadline=None)
@given(**CASES)
@example("zero group", 4, 2, 16, True, torch.float16, 0)
@example("zero group", 4, 2, 16, False, torch.float16, 0)
@example("tiny", 8, 1, 32, False, torch.float16, 0)
def test_min_max_rounding(
    kind: str, bits: int, groups: int, size: int, symmetric: bool, dtype: torch.dtype, seed: int
) -> None:
    weight, scheme = weight_of(kind, 7, groups * size, seed), IntScheme(bits, size, symmetric)
    grid = min_max_grid(weight, scheme, dtype)
    quantized = quantize(weight, grid)
    assert quantized.scale.dtype == dtype
    assert quantized.scale.shape == (7, groups)
    assert (quantized.zero_point is None) == symmetric
    assert in_range(quantized)
    # Half a step, half a step more at the ends of the range, and what rounding the scale moves those ends by.
    levels = 2**bits - 1
    slack = levels * (
        torch.finfo(dtype).eps + (2.0**-25 / grid.scale.double().abs().min() if dtype == torch.float16 else 0)
    )
    off = steps_off(weight, quantized)
    assert off.max() <= 1.0 + slack + 1e-3
    # Away from the ends of the range it is half a step, because codes are computed from the rounded scale.
    codes = quantized.codes
    inside = (codes > scheme.qmin) & (codes < scheme.qmax)
    assert not inside.any() or off[inside].max() <= 0.5 + 1e-3


@settings(max_examples=150, deadline=None)
@given(**CASES)
@example("zero group", 4, 2, 16, True, torch.float16, 0)
def test_no_other_code_is_nearer(
    kind: str, bits: int, groups: int, size: int, symmetric: bool, dtype: torch.dtype, seed: int
) -> None:
    weight, scheme = weight_of(kind, 3, groups * size, seed), IntScheme(bits, size, symmetric)
    quantized = quantize(weight, search_grid(weight, scheme, dtype))
    assert in_range(quantized)
    best = steps_off(weight, quantized)
    for code in range(scheme.qmin, scheme.qmax + 1, max(1, 2**bits // 16)):
        other = QuantizedTensor(torch.full_like(quantized.codes, code), quantized.scale, quantized.zero_point, scheme)
        assert (best <= steps_off(weight, other) + 1e-3).all()


@settings(max_examples=100, deadline=None)
@given(**CASES, weighted=st.booleans())
def test_the_search_is_never_worse_on_its_own_objective(
    kind: str, bits: int, groups: int, size: int, symmetric: bool, dtype: torch.dtype, seed: int, weighted: bool
) -> None:
    weight, scheme = weight_of(kind, 5, groups * size, seed), IntScheme(bits, size, symmetric)
    importance = torch.eye(size).expand(groups, size, size)
    if weighted:
        importance = torch.stack([stats_of(correlated(3 * size + 1, size, seed + g)).hessian for g in range(groups)])

    def loss(quantized: QuantizedTensor) -> Tensor:
        error = (weight.double() - values(quantized)).reshape(5, groups, size)
        return torch.einsum("ogi,gij,ogj->og", error, importance.double(), error)

    plain = quantize(weight, min_max_grid(weight, scheme, dtype))
    searched = quantize(weight, search_grid(weight, scheme, dtype, importance if weighted else None))
    assert in_range(searched)
    assert (loss(searched) <= loss(plain) * (1 + 1e-4) + 1e-12).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_pays_on_normal_weights(bits: int, symmetric: bool) -> None:
    weight, scheme = normal(64, 256), IntScheme(bits, 128, symmetric)
    plain = quantize(weight, min_max_grid(weight, scheme, torch.float32))
    searched = quantize(weight, search_grid(weight, scheme, torch.float32))
    unit = torch.eye(256)
    share = objective(weight, searched, unit).sum() / objective(weight, plain, unit).sum()
    assert share < {2: 0.6, 3: 0.8, 4: 0.9}[bits]


def test_a_negative_scale_gives_the_longer_side_the_extra_code() -> None:
    weight = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7]])
    scheme = IntScheme(4, 16)
    negative = search_grid(weight, scheme, torch.float32).scale
    assert negative.item() < 0
    assert search_grid(-weight, scheme, torch.float32).scale.item() > 0
    assert quantize(weight, search_grid(weight, scheme, torch.float32)).codes[0, 0] == scheme.qmin
    assert steps_off(weight, quantize(weight, search_grid(weight, scheme, torch.float32))).max() < 0.2


def test_the_step_is_a_share_of_the_whole_range() -> None:
    """The 7.5 grid at 4 bits: fifteen steps from end to end, and nothing in between is off by more than half a step."""
    weight = torch.linspace(-1, 1, 129).reshape(1, 129)
    grid = min_max_grid(weight, IntScheme(4, None), torch.float32)
    assert grid.scale.item() == pytest.approx(2 / 15)
    assert steps_off(weight, quantize(weight, grid)).max() <= 0.5 + 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_scales_can_be_divided_by(dtype: torch.dtype) -> None:
    scale = stored_scale(torch.tensor([0.0, -0.0, 1e-12, -1e-12, 3e-8, 1.0, -1.0]), dtype, 8)
    assert scale.dtype == dtype
    assert (scale != 0).all()
    assert torch.isfinite(1 / scale.float()).all()
    assert scale[-2:].tolist() == [1.0, -1.0]


def test_rtn_is_rounding_on_those_grids() -> None:
    weight, scheme = normal(9, 96), IntScheme(3, 32, False)
    plain = transform(weight, scheme, RtnConfig(), torch.bfloat16)
    searched = transform(weight, scheme, RtnConfig(scale_search=True), torch.bfloat16)
    for found, grid in (
        (plain, min_max_grid(weight, scheme, torch.bfloat16)),
        (searched, search_grid(weight, scheme, torch.bfloat16)),
    ):
        assert torch.equal(found.codes, quantize(weight, grid).codes)
        assert torch.equal(found.scale, grid.scale)
    unit = torch.eye(96)
    assert objective(weight, searched, unit).sum() < objective(weight, plain, unit).sum()


@pytest.mark.parametrize("searched", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [60000.0, 65504.0, 1e-4, 1e-7, 0.0])
def test_half_precision_grids_decode_to_numbers(size: float, bits: int, symmetric: bool, searched: bool) -> None:
    """The largest weights of float16, and groups so small that their step is below what it can hold."""
    weight = torch.stack([normal(64).clamp(-1, 1), normal(64, seed=1).abs().clamp(max=1)])
    weight = (weight / weight.abs().amax(1, keepdim=True) * size).half().float()
    weight[0, :32] *= -1
    scheme = IntScheme(bits, 32, symmetric)
    build = search_grid if searched else min_max_grid
    quantized = quantize(weight, build(weight, scheme, torch.float16))
    assert in_range(quantized)
    dense = quantized.dequantize()
    assert dense.dtype == torch.float16
    assert torch.isfinite(dense).all()
    if not searched and size > 1:
        step = 2 * size / (2**bits - 1) if symmetric else (weight.max() - weight.min()) / (2**bits - 1)
        assert (dense.float() - weight).abs().max() <= step * 1.2 + size * 0.01, "hardly anything is clipped"


def test_scales_never_decode_to_infinity_whatever_the_refit_wants() -> None:
    for reach in range(1, 256):
        scale = stored_scale(torch.tensor([1e9, -1e9]), torch.float16, reach)
        product = scale * torch.tensor(reach, dtype=torch.float16)
        assert torch.isfinite(product).all()
        assert (product.abs() > 65000).all()

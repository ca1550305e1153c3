"""HQQ against the objective that it lowers, worked out here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.quantization import hqq
from compress.quantization.configs import HqqConfig
from compress.quantization.grid import min_max_grid, quantize
from compress.types import IntScheme, QuantizedTensor
from tests.quantization.data import normal

P = 0.7


def heavy_tailed(rows: int = 32, width: int = 128) -> Tensor:
    """Weights of which a few are far larger than the others, off-centre so that zero points matter."""
    weight = 0.02 * normal(rows, width) + 0.01
    weight[:, ::37] *= 8
    return weight


def loss(weight: Tensor, found: QuantizedTensor) -> Tensor:
    """sum |W - dense|^p of every group of 32: (out, 4); decoded in float32, as the fit does."""
    levels = found.codes.float().reshape(weight.shape[0], -1, 32)
    if found.zero_point is not None:
        levels = levels - found.zero_point.float().unsqueeze(-1)
    return (weight.reshape(levels.shape) - levels * found.scale.float().unsqueeze(-1)).abs().pow(P).sum(-1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_group_is_worse_than_it_began_and_most_are_better(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    weight, scheme = heavy_tailed(), IntScheme(bits, 32, symmetric)
    found = hqq.transform(weight, scheme, HqqConfig(p=P), dtype)
    start = quantize(weight, min_max_grid(weight, scheme, dtype))
    assert (found.scale.dtype, found.scale.shape) == (dtype, (32, 4))
    before, after = loss(weight, start), loss(weight, found)
    assert (after <= before * (1 + 1e-5)).all()
    assert float((after < 0.99 * before).float().mean()) > 0.4
    assert after.sum() < 0.98 * before.sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_on_the_grid_already_stays(symmetric: bool) -> None:
    scheme = IntScheme(4, 32, symmetric)
    exact = quantize(heavy_tailed(), min_max_grid(heavy_tailed(), scheme, torch.float32)).dequantize()
    found = hqq.transform(exact, scheme, HqqConfig(), torch.float32)
    torch.testing.assert_close(found.dequantize(), exact, rtol=1e-5, atol=1e-6)


def test_codes_belong_to_the_stored_scales_and_zero_points() -> None:
    weight, scheme = heavy_tailed(), IntScheme(3, 32, symmetric=False)
    found = hqq.transform(weight, scheme, HqqConfig(), torch.bfloat16)
    assert found.zero_point is not None
    assert found.zero_point.dtype == torch.int8
    wanted = (weight.reshape(32, 4, 32) / found.scale.float().unsqueeze(-1)).round() + found.zero_point.unsqueeze(-1)
    assert torch.equal(found.codes, wanted.clamp(-4, 3).reshape(32, 128).to(torch.int8))


@pytest.mark.parametrize("symmetric", [True, False])
def test_constant_and_empty_groups_stay_finite(symmetric: bool) -> None:
    weight = torch.cat([torch.zeros(4, 32), torch.full((4, 32), 0.3), torch.full((4, 32), -1e-30)], 1)
    found = hqq.transform(weight, IntScheme(4, 32, symmetric), HqqConfig(), torch.float32).dequantize()
    assert torch.isfinite(found).all()
    assert torch.equal(found[:, :32], torch.zeros(4, 32))
    torch.testing.assert_close(found[:, 32:64], weight[:, 32:64], rtol=0.07, atol=0)

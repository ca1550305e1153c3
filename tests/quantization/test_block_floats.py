"""Blocks of floats: what each step up the ladder of scales and codes is worth, and that none makes things worse."""

from __future__ import annotations

import pytest
import torch

from compress.calibration.statistics import LinearStats
from compress.quantization import block_floats, gptq_floats, sweep
from compress.quantization.configs import GptqConfig
from compress.schemes import FIXED_SCHEMES
from compress.types import BlockFloatScheme, QuantizedTensor
from tests.quantization.data import correlated, normal, prepared, stats_of

SCHEMES = [s for s in FIXED_SCHEMES.values() if isinstance(s, BlockFloatScheme) and s.inputs is None]
PLAIN = {"scale_search": False, "descent_sweeps": 0, "correction": 0.0}
by_label = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)


def squared(weight: torch.Tensor, found: QuantizedTensor) -> torch.Tensor:
    return (weight - found.dequantize().float()).square().sum(1)


def by_outputs(weight: torch.Tensor, found: QuantizedTensor, hessian: torch.Tensor) -> torch.Tensor:
    error = (weight - found.dequantize().float()).double()
    return ((error @ hessian.double()) * error).sum(1)


def moments(hessian: torch.Tensor, scheme: BlockFloatScheme) -> torch.Tensor:
    size = scheme.group_size
    return torch.stack([hessian[i : i + size, i : i + size] for i in range(0, len(hessian), size)])


def gptq(weight: torch.Tensor, stats: LinearStats, scheme: BlockFloatScheme, **options: object) -> QuantizedTensor:
    config = GptqConfig(**options)
    return gptq_floats.transform(weight, prepared(stats, config), scheme, config, float(weight.abs().amax()))


@by_label
def test_a_covering_scale_reaches_the_largest_and_is_the_closest_that_does(scheme: BlockFloatScheme) -> None:
    weight = normal(16, 96) * torch.logspace(-2, 1, 96)
    found = block_floats.transform(weight, scheme, search=False)
    blocks = weight.unflatten(1, (-1, scheme.group_size)).abs().amax(-1)
    share = blocks / (block_floats.steps(found.scale, found.divisor) * scheme.highest)
    if scheme.spans_matrix:  # nearest of eight to the octave
        assert float((share - 1).abs().max()) <= 2.0**-4
    else:
        assert float(share.min()) > 0.5
        assert float(share.max()) <= 1.0


@by_label
def test_every_weight_is_exact_in_bfloat16(scheme: BlockFloatScheme) -> None:
    found = block_floats.transform(normal(16, 96) * 0.037, scheme, search=True)
    codes = found.dequantize().float().unflatten(1, (-1, scheme.group_size))
    exact = codes.double() / block_floats.steps(found.scale, found.divisor).double().unsqueeze(-1)
    assert torch.equal(exact, block_floats.nearest(exact.float(), scheme).double())


@by_label
def test_the_ladder(scheme: BlockFloatScheme) -> None:
    """Each step lowers the error that it is for: of weights by a sweep, of outputs by the weighted sweep, then GPTQ."""
    weight, stats = normal(48, 192) * 0.05, stats_of(correlated(900, 192))
    covering = block_floats.transform(weight, scheme, search=False)
    searched = block_floats.transform(weight, scheme, search=True)
    weighted = sweep.transform(weight, scheme, moments(stats.hessian, scheme), torch.float32)
    assert bool((squared(weight, searched) <= squared(weight, covering)).all())
    blocks = [
        sum(
            float(by_outputs(weight[:, i : i + scheme.group_size], cut(q, i, scheme), part).sum())
            for i, part in zip(range(0, 192, scheme.group_size), moments(stats.hessian, scheme), strict=True)
        )
        for q in (covering, searched, weighted)
    ]
    assert blocks[2] < blocks[1] <= blocks[0]
    plain, full = gptq(weight, stats, scheme, **PLAIN), gptq(weight, stats, scheme)
    losses = [float(by_outputs(weight, q, stats.hessian).sum()) for q in (weighted, plain, full)]
    assert losses[2] < losses[1] < losses[0]


def cut(found: QuantizedTensor, start: int, scheme: BlockFloatScheme) -> QuantizedTensor:
    """One block of inputs of a quantised weight."""
    place = start // scheme.group_size
    codes = found.codes[:, start : start + scheme.group_size]
    return QuantizedTensor(codes, found.scale[:, place : place + 1], None, scheme, found.divisor)


@by_label
@pytest.mark.parametrize("act_order", [True, False])
def test_with_an_identity_hessian_gptq_is_round_to_nearest(scheme: BlockFloatScheme, act_order: bool) -> None:
    weight, stats = normal(19, 96) * 0.05, LinearStats(torch.eye(96), None, 1000)
    found = gptq(weight, stats, scheme, act_order=act_order, **PLAIN)
    expected = block_floats.transform(weight, scheme, search=False)
    assert torch.equal(found.dequantize(), expected.dequantize())


@by_label
def test_descent_never_makes_a_row_worse(scheme: BlockFloatScheme) -> None:
    weight, stats = normal(24, 96) * 0.05, stats_of(correlated(200, 96))
    before, after = (gptq(weight, stats, scheme, **{**PLAIN, "descent_sweeps": n}) for n in (0, 6))
    hessian = stats.hessian + 0.01 * stats.hessian.diagonal().mean() * torch.eye(96)
    assert torch.equal(before.scale.view(torch.uint8), after.scale.view(torch.uint8)), "block scales are frozen"
    lost, kept = by_outputs(weight, after, hessian), by_outputs(weight, before, hessian)
    assert bool((lost <= kept * (1 + 1e-5)).all())
    assert float(lost.sum()) < float(kept.sum())


def test_a_shared_range_makes_a_shared_divisor() -> None:
    scheme, small = SCHEMES[0], normal(4, 32) * 0.01
    assert scheme.name == "NVFP4A16"
    own, shared = (block_floats.transform(small, scheme, False, highest) for highest in (None, 10.0))
    assert own.divisor is not None
    assert shared.divisor is not None
    assert float(own.divisor) > float(shared.divisor) == 256.0  # 2688 / 10, the power of two below
    torch.testing.assert_close(own.dequantize(), shared.dequantize(), rtol=0, atol=0.003)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
@by_label
def test_extremes_stay_finite(scheme: BlockFloatScheme, size: float) -> None:
    weight = torch.full((3, 32), size)
    weight[0] = 0
    found = block_floats.transform(weight, scheme, search=True)
    torch.testing.assert_close(found.dequantize().float(), weight, rtol=0.21, atol=0)  # 5 lies halfway from 4 to 6

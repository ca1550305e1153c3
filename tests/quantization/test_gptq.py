"""GPTQ: what it reduces to, what it wins, and that none of its steps ever makes its own objective worse."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.calibration.statistics import LinearStats
from compress.quantization import gptq, rtn
from compress.quantization.configs import GptqConfig, RtnConfig
from compress.quantization.gptq import Correction
from compress.quantization.hessian import cholesky, damped, inverse_of_triangle
from compress.types import IntScheme, QuantizedTensor
from tests.quantization.data import correlated, in_range, normal, objective, prepared, stats_of

PLAIN = {"damp_frac": 0.01, "scale_search": False, "descent_sweeps": 0, "refit_rounds": 0, "correction": 0.0}
FORMS = [IntScheme(bits, size, sym) for bits in (2, 3, 4, 8) for size in (32, None) for sym in (True, False)]


def run(
    weight: Tensor, stats: LinearStats, scheme: IntScheme, dtype: torch.dtype = torch.float32, **options: object
) -> QuantizedTensor:
    """GPTQ with these settings, the rest at their defaults."""
    config = GptqConfig(**options)
    shared = prepared(stats, config)
    assert shared.factored is not None
    return gptq.transform(corrected(weight, shared), shared, scheme, config, dtype)


def corrected(weight: Tensor, shared: gptq.Preconditioner, missed: Tensor | None = None) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return shared.corrected(weight, pool, missed)


def damped_hessian(stats: LinearStats, damp_frac: float = 0.01) -> Tensor:
    """H + damping, the form that the method minimises; no dead inputs here."""
    return stats.hessian + damp_frac * stats.hessian.diagonal().mean() * torch.eye(len(stats.hessian))


@pytest.mark.parametrize("scheme", FORMS, ids=lambda scheme: scheme.label)
@pytest.mark.parametrize("act_order", [True, False])
def test_with_an_identity_hessian_it_is_round_to_nearest(scheme: IntScheme, act_order: bool) -> None:
    weight, stats = normal(19, 96) * 0.05, LinearStats(torch.eye(96), None, 1000)
    found = run(weight, stats, scheme, torch.bfloat16, act_order=act_order, **PLAIN)
    expected = rtn.transform(weight, scheme, RtnConfig(), torch.bfloat16)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)
    if not scheme.symmetric:
        assert found.zero_point is not None
        assert expected.zero_point is not None
        assert torch.equal(found.zero_point, expected.zero_point)


@pytest.mark.parametrize("scheme", FORMS, ids=lambda scheme: scheme.label)
def test_it_beats_rounding_where_inputs_are_correlated(scheme: IntScheme) -> None:
    weight, stats = normal(48, 96) * 0.05, stats_of(correlated(800, 96))
    rounding = objective(weight, rtn.transform(weight, scheme, RtnConfig(), torch.float32), stats.hessian).sum()
    plain = objective(weight, run(weight, stats, scheme, **PLAIN), stats.hessian).sum()
    full = run(weight, stats, scheme)
    assert in_range(full)
    assert full.codes.shape == weight.shape
    assert plain < 0.8 * rounding
    assert objective(weight, full, stats.hessian).sum() < min(0.95 * plain, 0.6 * rounding)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(2, 8),
    groups=st.integers(1, 4),
    size=st.sampled_from([4, 8, 16]),
    symmetric=st.booleans(),
    tokens=st.sampled_from([10, 60, 400]),
    scale_search=st.booleans(),
    act_order=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_no_step_makes_a_row_worse(
    bits: int, groups: int, size: int, symmetric: bool, tokens: int, scale_search: bool, act_order: bool, seed: int
) -> None:
    width = groups * size
    weight, stats = normal(13, width, seed=seed), stats_of(correlated(tokens, width, seed))
    hessian, scheme = damped_hessian(stats), IntScheme(bits, size, symmetric)
    losses = [
        objective(weight, run(weight, stats, scheme, scale_search=scale_search, act_order=act_order, **polish), hessian)
        for polish in (
            {"descent_sweeps": 0, "refit_rounds": 0},
            {"descent_sweeps": 1, "refit_rounds": 0},
            {"descent_sweeps": 4, "refit_rounds": 0},
            {"descent_sweeps": 4, "refit_rounds": 1},
            {"descent_sweeps": 4, "refit_rounds": 3},
        )
    ]
    for before, after in itertools.pairwise(losses):
        assert (after <= before * (1 + 1e-3) + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_refitted_scales_are_judged_as_they_are_stored(dtype: torch.dtype) -> None:
    weight, stats = normal(32, 64), stats_of(correlated(500, 64))
    hessian, scheme = damped_hessian(stats), IntScheme(3, 32)
    once = run(weight, stats, scheme, dtype, refit_rounds=0)
    refitted = run(weight, stats, scheme, dtype, refit_rounds=2)
    assert refitted.scale.dtype == dtype
    assert not torch.equal(refitted.scale, once.scale)
    before, after = objective(weight, once, hessian), objective(weight, refitted, hessian)
    assert (after <= before * (1 + 1e-3)).all()
    assert after.sum() < 0.99 * before.sum()


def test_dequantised_weights_are_a_descent_minimum() -> None:
    """No single code can be changed for the better once the sweeps have come to rest."""
    weight, stats = normal(6, 24), stats_of(correlated(300, 24))
    hessian, scheme = damped_hessian(stats), IntScheme(3, 12)
    found = run(weight, stats, scheme, descent_sweeps=64, refit_rounds=0)
    best = objective(weight, found, hessian)
    for column in range(24):
        for step in (-1, 1):
            codes = found.codes.clone()
            codes[:, column] = (codes[:, column] + step).clamp(scheme.qmin, scheme.qmax)
            moved = objective(weight, QuantizedTensor(codes, found.scale, found.zero_point, scheme), hessian)
            assert (moved >= best * (1 - 1e-4)).all()


def test_activation_order_pays_and_leaves_groups_as_stored() -> None:
    weight, stats, scheme = normal(64, 128), stats_of(correlated(1500, 128)), IntScheme(3, 32)
    ordered = run(weight, stats, scheme, **PLAIN, act_order=True)
    unordered = run(weight, stats, scheme, **PLAIN, act_order=False)
    assert torch.equal(ordered.scale, unordered.scale), "scales are those of the stored order"
    hessian = stats.hessian
    assert objective(weight, ordered, hessian).sum() < 0.98 * objective(weight, unordered, hessian).sum()


@pytest.mark.parametrize("act_order", [True, False])
def test_permuted_inputs_give_the_permuted_result(act_order: bool) -> None:
    """Per channel there is one group, so the order in which columns are stored must not matter with act_order."""
    weight, x = normal(9, 40), correlated(500, 40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    options = {**PLAIN, "act_order": act_order}
    scheme = IntScheme(4, None)
    straight = run(weight, stats_of(x), scheme, **options).codes[:, order]
    permuted = run(weight[:, order].contiguous(), stats_of(x[:, order]), scheme, **options).codes
    agreement = (straight == permuted).double().mean()
    assert (agreement > 0.99) == act_order


def test_the_importance_of_a_group_is_what_the_others_cannot_undo() -> None:
    x = correlated(600, 48)
    shared = prepared(stats_of(x), GptqConfig())
    hessian = damped_hessian(shared.stats).double()
    for groups in (1, 3, 48):
        size = 48 // groups
        found = shared.inverse_blocks(groups).double()
        for group in range(groups):
            inside = torch.arange(group * size, (group + 1) * size)
            outside = torch.tensor([i for i in range(48) if i not in inside], dtype=torch.int64)
            expected = hessian[inside][:, inside]  # the Schur complement of the other columns
            if len(outside):
                rest = torch.linalg.solve(hessian[outside][:, outside], hessian[outside][:, inside])
                expected = expected - hessian[inside][:, outside] @ rest
            torch.testing.assert_close(found[group], expected, rtol=2e-3, atol=1e-4 * float(expected.abs().max()))


def drifting(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Inputs x of a linear behind quantised layers, and x' of the same tokens in the original model."""
    original = correlated(tokens, width)
    wrong = torch.eye(width) + 0.15 * normal(width, width, seed=8) / width**0.5
    return original @ wrong, original


def test_the_correction_undoes_what_earlier_layers_lost() -> None:
    x, original = drifting(4000, 48)
    weight, stats, scheme = normal(32, 48), stats_of(x, original), IntScheme(4, 16)

    def lost(quantized: QuantizedTensor) -> float:
        return float((original @ weight.T - x @ quantized.dequantize().T).square().mean())

    without, half, full = (lost(run(weight, stats, scheme, correction=share)) for share in (0.0, 0.5, 1.0))
    assert full < half < without
    assert full < 0.5 * without
    assert lost(run(weight, stats_of(x), scheme)) == pytest.approx(without), "no drift, nothing to correct"


def test_the_correction_is_shrunk_where_tokens_are_few() -> None:
    """On tokens that it did not see, a correction from few tokens must not lose more than none at all."""
    x, original = drifting(4000, 48)
    weight, scheme = normal(32, 48), IntScheme(8, 16)

    def lost(tokens: int, share: float) -> float:
        few = stats_of(x[:tokens], original[:tokens] + 0.3 * normal(tokens, 48, seed=5))
        quantized = run(weight, few, scheme, correction=share, damp_frac=0.01)
        return float((original[2000:] @ weight.T - x[2000:] @ quantized.dequantize().T).square().mean())

    assert lost(2000, 1.0) < 0.5 * lost(2000, 0.0)
    assert lost(12, 1.0) < 1.1 * lost(12, 0.0)


@pytest.mark.parametrize("scheme", FORMS[::3], ids=lambda scheme: scheme.label)
def test_rows_may_be_handed_over_in_tiles(scheme: IntScheme) -> None:
    x, original = drifting(500, 96)
    weight, config = normal(70, 96), GptqConfig()
    shared = prepared(stats_of(x, original), config)
    before, target = weight.clone(), corrected(weight, shared)
    whole = gptq.transform(target, shared, scheme, config, torch.bfloat16)
    tiles = [gptq.transform(rows, shared, scheme, config, torch.bfloat16) for rows in target.split(32)]
    # Products of different heights may round differently, so a row may part from itself at a tie, not more.
    same = (torch.cat([tile.codes for tile in tiles]) == whole.codes).all(1)
    assert same.double().mean() > 0.8
    dense = torch.cat([tile.dequantize() for tile in tiles])
    assert (original @ weight.T - x @ dense.float().T).norm() == pytest.approx(
        float((original @ weight.T - x @ whole.dequantize().float().T).norm()), rel=1e-2
    )
    assert torch.equal(weight, before), "the weight that was handed over stays as it is"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_dead_rows_groups_and_inputs(dtype: torch.dtype, symmetric: bool) -> None:
    weight, x = normal(16, 64) * 0.05, correlated(400, 64)
    weight[2, :32] = 0
    weight[5] = 0
    x[:, [3, 40]] = 0
    stats, scheme = stats_of(x), IntScheme(4, 32, symmetric)
    found = run(weight, stats, scheme, dtype)
    assert in_range(found)
    dense = found.dequantize().float()
    assert torch.isfinite(dense).all()
    assert dense[5].abs().max() == 0
    plain = rtn.transform(weight, scheme, RtnConfig(), dtype)
    rows = torch.tensor([row for row in range(16) if row != 5])
    assert (
        objective(weight, found, stats.hessian)[rows].sum() < 0.7 * objective(weight, plain, stats.hessian)[rows].sum()
    )


@pytest.mark.parametrize("width", [1, 5, 96, 600])
def test_rows_divided_by_the_hessian(width: int) -> None:
    """Against a float64 solve; 600 is wide enough for the triangle to be split."""
    hessian = stats_of(correlated(900, width)).hessian
    found = cholesky(hessian, 0.01)
    assert found is not None
    rows = torch.randn(7, width, generator=torch.Generator().manual_seed(1))
    exact = torch.linalg.solve(damped(hessian, 0.01).double(), rows.double().T).T
    assert (found.divide(rows) - exact).abs().max() <= 1e-4 * exact.abs().max()
    inverse = inverse_of_triangle(found.lower).double()
    assert (inverse @ found.lower.double() - torch.eye(width)).abs().max() < 1e-3
    assert torch.equal(inverse, inverse.tril())


def test_the_correction_is_the_same_in_both_orders() -> None:
    generator = torch.Generator().manual_seed(2)
    stats = stats_of(correlated(600, 48))
    factored = cholesky(stats.hessian, 0.01)
    assert factored is not None
    difference = 0.01 * torch.randn(48, 48, generator=generator)
    weight = torch.randn(5, 48, generator=generator)
    correction = Correction(difference, factored)
    row_by_row = correction.corrected(weight)
    with ThreadPoolExecutor(1) as pool:
        correction.expand(pool)
    torch.testing.assert_close(correction.corrected(weight), row_by_row, rtol=1e-4, atol=1e-5)
    inverse = torch.linalg.inv(damped(stats.hessian, 0.01).double())
    torch.testing.assert_close(
        row_by_row.double(), weight + weight.double() @ difference.double() @ inverse, rtol=1e-3, atol=1e-3
    )
    assert (row_by_row - weight).abs().max() > 0.01


def test_what_the_stream_has_lost_is_made_up_for_as_far_as_inputs_tell_of_it() -> None:
    """Against the regression in float64; and the output comes closer to what the stream should be by more than half."""
    x, original = drifting(4000, 48)
    weight, through = normal(20, 48), 0.3 * normal(20, 48, seed=8)
    lost = x @ through.T + 0.01 * normal(4000, 20, seed=9)
    stats = stats_of(x, original)
    shared = prepared(stats, GptqConfig())
    assert stats.drift is not None
    missed = (lost.double().T @ x.double() / len(x)).float()
    share = len(x) / (len(x) + gptq.SHRINKAGE * 48)
    inverse = torch.linalg.inv(damped_hessian(stats).double())
    wanted = weight + share * (weight @ stats.drift.difference + missed).double() @ inverse
    for rows in (20, 100):  # fewer rows than inputs, and more: both orders of the products
        times = torch.arange(rows) % 20
        found = corrected(weight[times], shared, missed[times])
        torch.testing.assert_close(found.double(), wanted[times], rtol=1e-3, atol=1e-3)
    should = original @ weight.T + lost
    with_stream, without = corrected(weight, shared, missed), corrected(weight, shared)
    assert (should - x @ with_stream.T).square().sum() < 0.3 * (should - x @ without.T).square().sum()
    none = prepared(stats, GptqConfig(correction=0.0))
    assert torch.equal(corrected(weight, none, missed), weight)

"""Descent on codes in which rows know of each other: its objective, and what it reduces to."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import UserError
from compress.quantization import coupled, gptq
from compress.quantization.configs import GptqConfig
from compress.quantization.grid import min_max_grid, quantize
from compress.recipe import parse_recipe
from compress.types import IntScheme, QuantizedTensor
from tests.quantization.data import correlated, in_range, normal, prepared, stats_of


def loss(target: Tensor, found: QuantizedTensor, hessian: Tensor, curvature: Tensor) -> float:
    """tr(B E H E^T) with B as `coupled` shrinks it, in float64."""
    shrunk = (1 - coupled.SHRINKAGE) * curvature + coupled.SHRINKAGE * torch.diag(curvature.diagonal())
    error = (target - found.dequantize().float()).double()
    return float(((shrunk.double() @ error @ hessian.double()) * error).sum())


def data(out: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, the second moments of its inputs with damping, and a curvature with correlated outputs."""
    hessian = stats_of(correlated(500, width, seed)).hessian + 0.01 * torch.eye(width)
    pull = correlated(400, out, seed + 1)
    return normal(out, width, seed=seed), hessian, pull.T @ pull / len(pull)


@settings(max_examples=25, deadline=None)
@given(
    bits=st.integers(2, 8), out=st.sampled_from([1, 7, 70, 130]), groups=st.integers(1, 3), symmetric=st.booleans(),
    sweeps=st.integers(1, 3), seed=st.integers(0, 1000),
)  # fmt: skip
def test_no_sweep_makes_the_objective_worse(
    bits: int, out: int, groups: int, symmetric: bool, sweeps: int, seed: int
) -> None:
    weight, hessian, curvature = data(out, 8 * groups, seed)
    start = quantize(weight, min_max_grid(weight, IntScheme(bits, 8, symmetric), torch.float32))
    found = coupled.descend(start, weight, hessian, curvature, sweeps=sweeps)
    more = coupled.descend(start, weight, hessian, curvature, sweeps=sweeps + 1)
    assert in_range(found)
    assert torch.equal(found.scale, start.scale)
    before, after, later = (loss(weight, each, hessian, curvature) for each in (start, found, more))
    assert later <= after * (1 + 1e-4) + 1e-6
    assert after <= before * (1 + 1e-4) + 1e-6


def test_it_ends_where_no_single_code_helps() -> None:
    weight, hessian, curvature = data(70, 16)
    scheme = IntScheme(3, 8)
    start = quantize(weight, min_max_grid(weight, scheme, torch.float32))
    found = coupled.descend(start, weight, hessian, curvature, sweeps=50)
    best = loss(weight, found, hessian, curvature)
    assert best < 0.9 * loss(weight, start, hessian, curvature)
    for row, column in ((0, 0), (3, 7), (63, 15), (64, 2), (69, 9)):
        for step in (-1, 1):
            codes = found.codes.clone()
            codes[row, column] = (codes[row, column] + step).clamp(scheme.qmin, scheme.qmax)
            moved = QuantizedTensor(codes, found.scale, None, scheme)
            assert loss(weight, moved, hessian, curvature) >= best * (1 - 1e-4)


def test_outputs_that_do_not_meet_leave_gptqs_codes_at_rest() -> None:
    """With a diagonal curvature rows are on their own, and GPTQ has come to rest on just that."""
    weight, stats, scheme = normal(20, 48), stats_of(correlated(800, 48)), IntScheme(4, 16)
    config = GptqConfig(descent_sweeps=64, refit_rounds=0)
    shared = prepared(stats, config)
    rested = gptq.transform(weight, shared, scheme, config, torch.float32)
    diagonal = torch.diag(torch.arange(20).float())
    found = coupled.descend(rested, weight, shared.hessian, diagonal)
    assert (found.codes == rested.codes).double().mean() > 0.999


def test_what_is_felt_together_is_lost_less() -> None:
    """The error that counts, over tokens that neither saw, is lower by a quarter than GPTQ's."""
    weight, x = normal(48, 64), correlated(4000, 64)
    through = torch.linalg.qr(normal(48, 48, seed=3)).Q[:, :6]  # six directions of the outputs matter, others little
    curvature = through @ through.T + 0.02 * torch.eye(48)
    config, scheme = GptqConfig(), IntScheme(3, 32)
    shared = prepared(stats_of(x[:2000]), config)
    alone = gptq.transform(weight, shared, scheme, config, torch.bfloat16)
    together = coupled.descend(alone, weight, shared.hessian, curvature)

    def lost(found: QuantizedTensor) -> float:
        error = x[2000:] @ (weight - found.dequantize().float()).T
        return float(((error @ curvature) * error).sum())

    assert lost(together) < 0.75 * lost(alone)


def test_what_is_pruned_stays_zero_and_silent_outputs_stay() -> None:
    weight, hessian, curvature = data(40, 32)
    gone = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    curvature[5] = curvature[:, 5] = 0
    target = weight.masked_fill(gone, 0.0)
    start = quantize(target, min_max_grid(target, IntScheme(4, 16), torch.bfloat16))
    found = coupled.descend(start, target, hessian, curvature, gone, sweeps=2)
    assert found.codes[gone].abs().max() == 0
    assert not torch.equal(found.codes, start.codes)
    assert torch.equal(found.codes[5], start.codes[5])
    with ThreadPoolExecutor(1) as pool:
        again = pool.submit(coupled.descend, start, target, hessian, curvature, gone, sweeps=2).result()
    assert torch.equal(again.codes, found.codes)


@pytest.mark.parametrize(
    ("method", "scheme", "said"),
    [
        ({"kind": "gptq", "curvature_windows": 4}, {"name": "NVFP4"}, "curvature_windows is for integers"),
        ({"kind": "awq", "rounding": {"kind": "gptq", "curvature_windows": 4}}, {"bits": 4}, "leave it out"),
        ({"kind": "smoothquant", "rounding": {"kind": "gptq", "curvature_windows": 4}}, {"name": "W8A8"}, "follow"),
        ({"kind": "gptq", "curvature_windows": -1}, {"bits": 4}, "curvature_windows"),
    ],
)  # fmt: skip
def test_who_cannot_use_it_is_refused(method: dict[str, object], scheme: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_recipe({"version": 1, "stages": [{"kind": "quantize", "method": method, "scheme": scheme}]})

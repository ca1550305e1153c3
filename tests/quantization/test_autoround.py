"""AutoRound: gradients are those of the loss, steps lower it, and what is stored is what was tuned."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from compress.quantization.autoround import NARROWEST, WIDEST, TunedRounding, tune
from compress.quantization.configs import AutoRoundConfig
from compress.quantization.grid import min_max_grid, quantize
from compress.schemes import FIXED_SCHEMES
from compress.types import IntScheme
from tests.quantization.data import normal

OUT, WIDTH, GROUP = 6, 32, 8


def begun(bits: int = 3, *, symmetric: bool = True, dtype: torch.dtype = torch.float32) -> TunedRounding:
    weight = normal(OUT, WIDTH, seed=0)
    return TunedRounding(weight, min_max_grid(weight, IntScheme(bits, GROUP, symmetric), dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_begins_as_rounded_to_nearest(symmetric: bool, dtype: torch.dtype) -> None:
    weight = normal(OUT, WIDTH, seed=0)
    grid = min_max_grid(weight, IntScheme(3, GROUP, symmetric), dtype)
    found, nearest = TunedRounding(weight, grid).quantized(), quantize(weight, grid)
    torch.testing.assert_close(found.scale, nearest.scale)
    assert torch.equal(found.codes, nearest.codes)
    if not symmetric:
        assert found.zero_point is not None
        assert nearest.zero_point is not None
        assert torch.equal(found.zero_point, nearest.zero_point)


@pytest.mark.parametrize("symmetric", [True, False])
def test_ends_move_down_the_slope_of_the_stored_weight(symmetric: bool) -> None:
    """Against the exact formula without its rounding, differentiated by autograd."""
    tuned, pull = begun(symmetric=symmetric), normal(OUT, WIDTH, seed=1)
    weight, scheme = normal(OUT, WIDTH, seed=0).reshape(OUT, -1, GROUP), IntScheme(3, GROUP, symmetric)
    tuned.ends += 0.25 * torch.rand(tuned.ends.shape, generator=torch.Generator().manual_seed(2)) - 0.25
    ends = tuned.ends.clone().requires_grad_()
    grid = min_max_grid(weight.reshape(OUT, WIDTH), scheme, torch.float32)
    zero = torch.zeros_like(grid.scale) if grid.zero_point is None else grid.zero_point.float()
    low, high = ends[0] * (scheme.qmin - zero) * grid.scale, ends[1] * (scheme.qmax - zero) * grid.scale
    scale = grid.scale * ends[1] if symmetric else (high - low) / 7
    free = torch.zeros_like(scale) if symmetric else -low / scale + scheme.qmin
    held = tuned.grid().zero_point
    offset = (torch.zeros_like(free) if held is None else held.float() - free).detach()
    zero_now = (free + offset).unsqueeze(-1)
    exact = weight / scale.unsqueeze(-1) + zero_now
    codes = exact + (exact.round() - exact).detach()
    dense = (codes.clamp(scheme.qmin, scheme.qmax) - zero_now) * scale.unsqueeze(-1)
    torch.testing.assert_close(dense.detach().reshape(OUT, WIDTH), tuned.quantized().dequantize())
    (dense.reshape(OUT, WIDTH) * pull).sum().backward()
    assert ends.grad is not None
    before = tuned.ends.clone()
    tuned.step(pull, 0.0, 1e-3)
    moved = tuned.ends - before
    clear = ends.grad.abs() > 1e-4
    assert clear.float().mean() > (0.45 if symmetric else 0.9)
    assert torch.equal(moved[clear].sign(), -ends.grad[clear].sign())


@pytest.mark.parametrize("symmetric", [True, False])
def test_offsets_move_against_the_gradient_of_the_weight_unless_it_is_clipped(symmetric: bool) -> None:
    tuned, pull = begun(symmetric=symmetric), normal(OUT, WIDTH, seed=1)
    before = tuned.quantized()
    at_an_end = (before.codes == -4) | (before.codes == 3)
    tuned.step(pull, 0.01, 0.0)
    inside = tuned.offset != 0
    assert (inside | at_an_end).all()
    assert inside.float().mean() > 0.8
    assert torch.equal(tuned.offset[inside].sign(), -pull[inside].sign())


def test_zeros_stay_and_ranges_stay_within_bounds() -> None:
    weight = normal(OUT, WIDTH, seed=0)
    weight[:, ::2] = 0.0
    for symmetric in (True, False):
        tuned = TunedRounding(weight, min_max_grid(weight, IntScheme(3, GROUP, symmetric), torch.float32))
        for seed in range(20):
            tuned.step(normal(OUT, WIDTH, seed=seed).abs(), 0.2, 0.2)
        assert (tuned.quantized().dequantize()[:, ::2] == 0).all()
        assert tuned.ends.min() >= NARROWEST
        assert tuned.ends.max() <= WIDEST


@pytest.mark.parametrize("symmetric", [True, False])
def test_steps_lower_the_error_of_outputs_below_rounding_to_nearest(symmetric: bool) -> None:
    weight, mixing = normal(16, 64, seed=3), normal(64, 64, seed=4) * torch.linspace(0.1, 2.0, 64)
    hessian = mixing @ mixing.T
    tuned = TunedRounding(weight, min_max_grid(weight, IntScheme(3, 16, symmetric), torch.float32))

    def error() -> float:
        difference = tuned.quantized().dequantize() - weight
        return float(((difference @ hessian) * difference).sum())

    def gradients(windows: Sequence[int]) -> list[Tensor]:
        return [(tuned.quantized().dequantize() - weight) @ hessian]

    config = AutoRoundConfig(steps=100)
    first, best = tune([tuned], gradients, error, range(10), config, 0, lambda: None)
    assert best < 0.85 * first
    assert error() == pytest.approx(best)


def test_what_was_best_on_held_out_text_is_kept() -> None:
    tuned, found = begun(), iter([1.0, 0.5, 2.0, 3.0])
    states: list[Tensor] = []

    def measured() -> float:
        states.append(tuned.offset.clone())
        return next(found)

    config = AutoRoundConfig(steps=3, checks=3)
    first, best = tune([tuned], lambda _: [normal(OUT, WIDTH, seed=1)], measured, range(10), config, 0, lambda: None)
    assert (first, best) == (1.0, 0.5)
    assert torch.equal(tuned.offset, states[1])
    assert not torch.equal(states[1], states[3])


def test_what_it_is_not_for() -> None:
    config = AutoRoundConfig()
    assert config.refusal(IntScheme(4, 128)) is None
    assert "gptq" in str(config.refusal(FIXED_SCHEMES["FP8_DYNAMIC"]))

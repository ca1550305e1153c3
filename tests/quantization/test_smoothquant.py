"""SmoothQuant's search, against losses worked out here, and the cases in which it must change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from compress.formats.inputs import round_inputs
from compress.quantization import smoothquant
from compress.quantization.configs import SmoothQuantConfig
from compress.quantization.grid import min_max_grid, quantize
from compress.schemes import FIXED_SCHEMES
from compress.types import IntScheme
from tests.quantization.data import normal

W8A8, STATIC = FIXED_SCHEMES["W8A8"], FIXED_SCHEMES["W8A8_STATIC"]
OUTLIERS = [3, 50]


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


def salient(tokens: int = 200, width: int = 96) -> Tensor:
    """Inputs of which a few channels are large, as in large language models."""
    x = normal(tokens, width)
    x[:, OUTLIERS] *= 100
    return x


def loss(x: Tensor, weight: Tensor, scale: Tensor) -> float:
    """Mean over tokens of ||W x - Q(W s) Q(x / s)||^2 / ||W x||^2 for W8A8."""
    assert isinstance(W8A8, IntScheme)
    scaled = weight * scale
    dense = quantize(scaled, min_max_grid(scaled, W8A8, torch.float32)).dequantize()
    assert W8A8.inputs is not None
    wanted = x @ weight.T
    found = round_inputs(x / scale, W8A8.inputs) @ dense.T
    return float(((wanted - found).square().sum(1) / wanted.square().sum(1)).mean())


def search(
    x: Tensor, weights: dict[str, Tensor], pool: Executor, scheme: object = W8A8, grid: int = 21
) -> smoothquant.Smoothing:
    config = SmoothQuantConfig(grid=grid)
    return smoothquant.search_scale(weights, x.abs().amax(0), x, scheme, config, pool)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", [W8A8, STATIC, FIXED_SCHEMES["FP8_STATIC"]], ids=lambda scheme: scheme.label)
def test_outliers_move_into_the_weights(scheme: object, pool: Executor) -> None:
    weights = {"q": normal(64, 96), "k": normal(32, 96)}
    found = search(salient(), weights, pool, scheme)
    if scheme is FIXED_SCHEMES["FP8_STATIC"]:  # floating point minds outliers little
        assert found.loss <= found.identity_loss
        return
    assert found.scale is not None
    assert found.loss < 0.2 * found.identity_loss
    others = [i for i in range(96) if i not in OUTLIERS]
    assert float(found.scale[OUTLIERS].min()) > 2 * float(found.scale[others].max())


def test_losses_are_those_of_the_rounded_product(pool: Executor) -> None:
    x, weight = salient(), normal(64, 96)
    found = search(x, {"a": weight}, pool)
    assert found.scale is not None
    assert found.loss == pytest.approx(loss(x, weight, found.scale), rel=1e-4)
    assert found.identity_loss == pytest.approx(loss(x, weight, torch.ones(96)), rel=1e-4)


def test_no_other_alpha_is_better(pool: Executor) -> None:
    x, weight = salient(), normal(64, 96)
    found = search(x, {"a": weight}, pool, grid=11)
    highest, reach = x.abs().amax(0), weight.abs().amax(0)
    losses = {i / 10: loss(x, weight, highest ** (i / 10) / reach ** (1 - i / 10)) for i in range(11)}
    assert found.alpha == min(losses, key=losses.__getitem__)


def test_the_identity_stays_where_nothing_is_better(pool: Executor) -> None:
    """Inputs and weights of one magnitude each: every token and every row uses its whole range already."""
    x, weight = normal(100, 64).sign(), normal(32, 64).sign()
    found = search(x, {"a": weight}, pool)
    assert found.scale is None
    assert found.alpha is None
    assert found.loss == found.identity_loss


def test_channels_that_carry_nothing_keep_their_scale(pool: Executor) -> None:
    x, weight = salient(), normal(64, 96)
    x[:, 10], weight[:, 20] = 0, 0
    found = search(x, {"a": weight}, pool)
    assert found.scale is not None
    assert found.scale[[10, 20]].tolist() == [1.0, 1.0]
    assert torch.isfinite(found.scale).all()
    assert (found.scale > 0).all()


def test_inputs_of_zeros_are_no_reason_to_scale(pool: Executor) -> None:
    found = search(torch.zeros(10, 32), {"a": normal(8, 32)}, pool)
    assert found.scale is None

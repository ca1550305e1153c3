"""AWQ's scale search and clipping, against losses worked out in float64."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from compress.kernels import reference
from compress.quantization import awq
from compress.quantization.configs import AwqConfig
from compress.quantization.grid import min_max_grid, quantize
from compress.types import IntScheme
from tests.quantization.data import correlated, in_range, normal, stats_of, values

SCHEMES = [IntScheme(bits, size, sym) for bits in (3, 4) for size in (32, None) for sym in (True, False)]


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


def salient(tokens: int = 600, width: int = 96, channels: tuple[int, ...] = (3, 50)) -> Tensor:
    """Inputs of which a few channels are large, as in large language models."""
    x = normal(tokens, width)
    x[:, list(channels)] *= 30
    return x


def expected_loss(weight: Tensor, scale: Tensor, square_mean: Tensor, scheme: IntScheme) -> float:
    """sum_j E[x_j^2] ||w_j - Q(w_j s_j) / s_j||^2 by rounding to nearest, float64."""
    scaled = weight * scale
    error = (scaled.double() - values(quantize(scaled, min_max_grid(scaled, scheme, torch.float32)))) / scale.double()
    return float((error.square().sum(0) * square_mean.double()).sum())


def search(x: Tensor, weights: dict[str, Tensor], scheme: IntScheme, pool: Executor, **options: object) -> awq.Scaling:
    """The search, by plain rounding unless `clip` is among the options."""
    config = AwqConfig(**{"clip": False, **options})
    square_mean = x.square().mean(0)
    return awq.search_scale(
        weights, dict.fromkeys(weights, square_mean), x.abs().mean(0), dict.fromkeys(weights, scheme), config, pool
    )


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_flat_activations_keep_the_identity(scheme: IntScheme, pool: Executor) -> None:
    x = torch.where(normal(400, 96) > 0, 0.7, -0.7)
    found = search(x, {"a": normal(64, 96)}, scheme, pool, duo_scaling=False)
    assert found.scale is None
    assert found.loss == found.identity_loss


@pytest.mark.parametrize("duo_scaling", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_salient_channels_are_scaled_up(scheme: IntScheme, duo_scaling: bool, pool: Executor) -> None:
    x, weight = salient(), normal(64, 96)
    found = search(x, {"a": weight}, scheme, pool, duo_scaling=duo_scaling)
    assert found.scale is not None
    assert 0 < found.exponent <= 1
    assert found.scale.shape == (96,)
    assert set(found.scale.topk(2).indices.tolist()) == {3, 50}
    assert found.loss < 0.5 * found.identity_loss
    square_mean = x.square().mean(0)
    assert found.loss == pytest.approx(expected_loss(weight, found.scale, square_mean, scheme), rel=1e-3)
    assert found.identity_loss == pytest.approx(expected_loss(weight, torch.ones(96), square_mean, scheme), rel=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_nothing_on_the_grid_is_better(scheme: IntScheme, pool: Executor) -> None:
    """The candidates of section 3.2 with and without weight magnitudes, and the identity, built here again."""
    x, weight = salient(channels=(1, 2, 77)), normal(32, 96) ** 3
    found = search(x, {"a": weight}, scheme, pool, grid=6)
    size = scheme.group_size or 96
    shares = weight.abs().reshape(32, -1, size)
    magnitude = (shares / shares.amax(-1, keepdim=True)).reshape(32, 96).mean(0)
    absmean, square_mean = x.abs().mean(0), x.square().mean(0)
    losses = {(0.0, False): expected_loss(weight, torch.ones(96), square_mean, scheme)}
    for step in range(6):
        exponent = step / 5
        for duo in (False, True):
            scale = absmean**exponent / (magnitude ** (1 - exponent) + 1e-4 if duo else 1)
            scale = scale / (scale.max() * scale.min()).sqrt()
            losses[exponent, duo] = expected_loss(weight, scale, square_mean, scheme)
    best = min(losses.values())
    assert found.loss == pytest.approx(best, rel=1e-3)
    assert losses[found.exponent, found.duo] == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_where_clipping_follows_scales_are_judged_on_clipped_grids(scheme: IntScheme, pool: Executor) -> None:
    x, weight = salient(), normal(64, 96) ** 3
    found = search(x, {"a": weight}, scheme, pool, clip=True)
    assert found.scale is not None
    scales = torch.stack([torch.ones(96), found.scale]).double()
    importance = x.square().mean(0).double() / scales.square()
    wanted = reference.rounding_loss(
        weight.double(), scales, importance, awq.CLIPPED_SHARES, scheme.group_size or 96, scheme.bits, scheme.symmetric
    )
    assert [found.identity_loss, found.loss] == pytest.approx(wanted.tolist(), rel=1e-3)
    assert found.loss < search(x, {"a": weight}, scheme, pool).loss


@pytest.mark.parametrize("seed", range(5))
def test_never_worse_than_the_identity(seed: int, pool: Executor) -> None:
    x, weights = correlated(300, 64, seed), {"a": normal(16, 64, seed=seed), "b": normal(48, 64, seed=seed + 9) ** 3}
    found = search(x, weights, IntScheme(3, 32), pool)
    assert found.loss <= found.identity_loss
    assert (found.scale is None) == (found.loss == found.identity_loss)
    if found.scale is not None:
        assert (found.scale > 0).all()
        assert torch.isfinite(found.scale).all()


def test_losses_of_all_consumers_count(pool: Executor) -> None:
    x, scheme = salient(), IntScheme(4, 32)
    weights = {"a": normal(300, 96), "b": 5 * normal(40, 96, seed=1)}
    square_mean = x.square().mean(0)
    found = search(x, weights, scheme, pool)
    assert found.scale is not None
    both = sum(expected_loss(weight, found.scale, square_mean, scheme) for weight in weights.values())
    assert found.loss == pytest.approx(both, rel=1e-3)


def test_each_consumer_counts_by_its_own_inputs(pool: Executor) -> None:
    """Experts share the norm before them and see different tokens."""
    scheme, weights = IntScheme(4, 32), {"a": normal(32, 96), "b": normal(32, 96, seed=1)}
    means = {"a": salient().square().mean(0), "b": salient(channels=(7,)).square().mean(0)}
    schemes, config = dict.fromkeys(weights, scheme), AwqConfig(clip=False)
    found = awq.search_scale(weights, means, salient().abs().mean(0), schemes, config, pool)
    assert found.scale is not None
    both = sum(expected_loss(weights[name], found.scale, means[name], scheme) for name in weights)
    assert found.loss == pytest.approx(both, rel=1e-3)


def test_dead_and_nearly_dead_inputs(pool: Executor) -> None:
    x = salient()
    x[:, [5, 6]] = 0
    x[:, 7] *= 1e-12
    found = search(x, {"a": normal(32, 96)}, IntScheme(4, 32), pool)
    assert found.scale is not None
    assert torch.isfinite(found.scale).all()
    assert (found.scale > 0).all()
    assert found.loss < found.identity_loss


def test_threads_change_nothing() -> None:
    x, weights = salient(), {"a": normal(700, 96), "b": normal(300, 96, seed=1)}
    found = []
    for workers in (1, 2, 3):
        with ThreadPoolExecutor(workers) as pool:
            found.append(search(x, weights, IntScheme(4, 32), pool))
    assert len({(f.exponent, f.duo, f.loss, f.identity_loss) for f in found}) == 1


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_clipping_lowers_the_weighted_error(scheme: IntScheme) -> None:
    weight, x = normal(40, 96) ** 3, correlated(500, 96)
    groups = scheme.groups(96)
    size = 96 // groups
    hessian = stats_of(x).hessian
    blocks = torch.stack([hessian[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(groups)])

    def loss(dense: Tensor) -> Tensor:
        error = (weight.double() - dense).reshape(40, groups, size)
        return torch.einsum("ogi,gij,ogj->og", error, blocks.double(), error)

    clipped = awq.round_clipped(weight, blocks, scheme, torch.bfloat16)
    unclipped = awq.round_clipped(weight, None, scheme, torch.bfloat16)
    assert in_range(clipped)
    grid = min_max_grid(weight, scheme, torch.bfloat16)
    assert torch.equal(unclipped.codes, grid.encode(weight))
    assert torch.equal(unclipped.scale, grid.scale)
    assert (loss(values(clipped)) <= loss(values(unclipped)) * (1 + 1e-4)).all()
    assert loss(values(clipped)).sum() < 0.9 * loss(values(unclipped)).sum()


def test_powers_of_two_serve_a_salient_channel(pool: Executor) -> None:
    x, weight = salient(channels=(3,)), normal(64, 96)
    square_mean, config = x.square().mean(0), AwqConfig(clip=False)
    found = awq.search_scale(
        {"a": weight}, {"a": square_mean}, x.abs().mean(0), {"a": IntScheme(4, 32)}, config, pool, powers_of_two=True
    )
    assert found.scale is not None
    assert torch.equal(found.scale.log2(), found.scale.log2().round())
    assert found.scale[3] == found.scale.max() > found.scale.median()
    assert found.loss == pytest.approx(expected_loss(weight, found.scale, square_mean, IntScheme(4, 32)), rel=1e-3)

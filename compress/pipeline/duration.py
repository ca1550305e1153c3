"""How long a run will take: its work over rates that are measured here and now, on one thread, in milliseconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from compress.kernels import dispatch
from compress.models.skeleton import LinearSpec
from compress.pipeline.curvature_plan import curvature_operations
from compress.pipeline.job import Job
from compress.pipeline.linears import SAMPLE_TOKENS
from compress.pipeline.refine_plan import refine_operations
from compress.pipeline.routing import experts_per_token
from compress.quantization import awq, hqq, rtn, ternary
from compress.quantization.configs import (
    AutoRoundConfig,
    AwqConfig,
    HqqConfig,
    RtnConfig,
    SmoothQuantConfig,
    SweepConfig,
    TernaryConfig,
)
from compress.quantization.grid import quantize, search_grid
from compress.types import BlockFloatScheme, IntScheme, Scheme

TILE_ROWS = 64
TILE_WIDTH = 256
CANDIDATES = 8
# k, v and up see the inputs of q and gate, whose statistics serve them too.
SHARING = ("k_proj", "v_proj", "up_proj")


def seconds_estimate(job: Job) -> float:
    """Seconds that the blocks of this job take on this machine, with as many threads as torch uses now."""
    return on_all_threads(lambda: _single_threaded(job) + _refining(job))


def on_all_threads(measured: Callable[[], float]) -> float:
    """What `measured` finds on one thread, shared among as many as torch uses now."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measured() / threads
    finally:
        torch.set_num_threads(threads)


def _single_threaded(job: Job) -> float:
    specs = [spec for spec in job.skeleton.linears() if spec.name in job.schemes]
    rounding = _over_schemes(job, [*specs, *job.tables], rounding_rate)
    wanted = job.stage.calibration
    if wanted is None or not job.needs_blocks:
        return rounding
    tokens = wanted.windows * wanted.seq_len
    through = experts_per_token(job)
    share = 1.0 if through is None else through[0] / through[1]  # of the tokens, on the average of a block's experts

    def seen(spec: LinearSpec) -> float:
        return 1.0 if spec.expert is None else share

    forward = 2.0 * sum(seen(spec) * spec.in_features * spec.out_features for spec in job.skeleton.linears())  # a token
    product = product_rate()
    method, smoothing = job.rounding, 0.0
    if isinstance(job.stage.method, SmoothQuantConfig):
        products = (job.stage.method.grid + 1) * min(tokens, SAMPLE_TOKENS) * forward * product
        smoothing = tokens * forward * product + products + (job.stage.method.grid + 1) * rounding
    if isinstance(job.stage.method, AwqConfig):
        scaling = job.stage.method
        tried = (scaling.grid * (2 if scaling.duo_scaling else 1)) if scaling.scale_search else 0
        smoothing = tokens * forward * product + tried * _over_schemes(job, specs, _candidate_rate)
    if isinstance(method, RtnConfig | SweepConfig | HqqConfig | TernaryConfig | AwqConfig):
        return tokens * forward * product + rounding + smoothing
    if isinstance(method, AutoRoundConfig):
        return autoround_operations(job, forward) * product + rounding
    squares = sum(seen(spec) * spec.in_features**2 for spec in specs if not spec.name.endswith(SHARING))
    cubes = sum(float(spec.out_features) * spec.in_features**2 for spec in (*specs, *job.tables))
    compared = job.followed(tokens)
    per_token = (tokens + compared) * forward + (tokens + 2.0 * compared) * squares
    return (per_token + 12 * cubes + curvature_operations(job)) * product + rounding + smoothing


def autoround_operations(job: Job, forward: float) -> float:
    """Floating-point operations of matrix products, at so many per token of a forward pass through all blocks."""
    method, wanted = job.rounding, job.stage.calibration
    assert isinstance(method, AutoRoundConfig)
    assert wanted is not None
    tokens = wanted.samples * wanted.seq_len
    learnt = 3.0 * method.steps * method.windows * wanted.seq_len  # a forward and a backward pass
    checked = (min(method.checks, method.steps) + 1) * max(1.0, wanted.samples * method.held_out) * wanted.seq_len
    return forward * (4.0 * tokens + learnt + checked)


def _over_schemes(job: Job, specs: Sequence[LinearSpec], rate: Callable[[Job, Scheme], float]) -> float:
    """Seconds for all weights at a rate that depends on their schemes."""
    weights: dict[Scheme, int] = {}
    for spec in specs:
        scheme = job.schemes[spec.name]
        weights[scheme] = weights.get(scheme, 0) + spec.in_features * spec.out_features
    return sum(count * rate(job, scheme) for scheme, count in weights.items())


def _refining(job: Job) -> float:
    return 0.0 if job.stage.refine is None else refine_operations(job) * product_rate()


def rounding_rate(job: Job, scheme: Scheme) -> float:
    """Seconds per weight of choosing its grid and rounding to it, as the method does."""
    tile, method = _tile(scheme), job.rounding
    if isinstance(method, RtnConfig) or isinstance(scheme, BlockFloatScheme):
        plain = method if isinstance(method, RtnConfig) else RtnConfig(scale_search=True)
        return _seconds(lambda: rtn.transform(tile, scheme, plain, torch.float32)) / tile.numel()
    assert isinstance(scheme, IntScheme)
    if isinstance(method, TernaryConfig):
        return _seconds(lambda: ternary.transform(tile, scheme, torch.float32)) / tile.numel()
    if isinstance(method, HqqConfig):
        return _seconds(lambda: hqq.transform(tile, scheme, method, torch.float32)) / tile.numel()
    groups = scheme.groups(tile.shape[1])
    size = tile.shape[1] // groups
    importance = torch.eye(size).repeat(groups, 1, 1)
    return _seconds(lambda: quantize(tile, search_grid(tile, scheme, torch.float32, importance))) / tile.numel()


def _candidate_rate(job: Job, scheme: Scheme) -> float:
    """Seconds per weight and scale of AWQ's search."""
    tile, method = _tile(scheme), job.stage.method
    assert isinstance(scheme, IntScheme)
    assert isinstance(method, AwqConfig)
    ones = torch.ones(CANDIDATES, tile.shape[1])
    shares = awq.CLIPPED_SHARES if method.clip else (1.0,)
    size = scheme.group_size or tile.shape[1]
    taken = _seconds(
        lambda: dispatch.rounding_loss(tile, ones, ones, shares, size, scheme.bits, scheme.symmetric, threads=1)
    )
    return taken / (tile.numel() * CANDIDATES)


def product_rate() -> float:
    """Seconds per floating-point operation of a float32 matrix product."""
    a = torch.ones(384, 384)
    return _seconds(lambda: a @ a) / (2 * 384.0**3)


def _tile(scheme: Scheme) -> torch.Tensor:
    """A weight (out, in) of a size that is quick to work on and a width that the scheme's groups divide."""
    size = scheme.group_size or TILE_WIDTH
    width = size * max(1, TILE_WIDTH // size)
    return torch.randn(TILE_ROWS, width, generator=torch.Generator().manual_seed(0))


def _seconds(work: Callable[[], object]) -> float:
    """The shorter of two runs, after one that warms up."""
    work()
    taken = []
    for _ in range(2):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return max(min(taken), 1e-9)

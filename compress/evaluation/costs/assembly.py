"""From timings to a `CostRecord`: adds the sizes, the layers, the fresh process and the prices to what was timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from compress.evaluation.costs.layers import expected_bytes, fallback_reason, layer_costs
from compress.evaluation.costs.prices import PriceTable, price
from compress.evaluation.costs.process import Fresh
from compress.evaluation.costs.record import (
    CostRecord,
    Latency,
    Measured,
    PriceRecord,
    SpeedRatio,
    Throughput,
    Timed,
    Workload,
)
from compress.evaluation.costs.sizes import size_record
from compress.evaluation.costs.timing import measured, median_interval, round_ratios
from compress.evaluation.costs.workload import BATCH_SIZES, REPEATS, WARM_UP, Plan
from compress.models.checkpoint import Checkpoint
from compress.runtime.paged_backend import PagedRuntime
from compress.runtime.protocol import Generation, Runtime


@dataclass(frozen=True, slots=True)
class Settings:
    """What to run. Lengths None: what fits the context. `fresh`: whether to load in a fresh process too. `seconds`: for
    all parts together; repeats, batch sizes and loads that do not fit are left out; None: all are run. `kv_cache` and
    `deterministic`: what the candidate was loaded with; `baseline_kernel`: what the baseline was, if not with `kernel`.
    """

    prompt_tokens: int | None = None
    new_tokens: int | None = None
    batch_sizes: Sequence[int] = BATCH_SIZES
    repeats: int = REPEATS
    seconds: float | None = None
    kernel: str = "auto"
    fresh: bool = True
    machine: str | None = None
    kv_cache: str = "auto"
    deterministic: bool = False
    baseline_kernel: str | None = None


@dataclass(frozen=True, slots=True)
class Moment:
    """The machine while models were timed: cores that others kept busy; bytes per second read. None: not known."""

    others: float | None
    bandwidth: float | None


@dataclass(frozen=True, slots=True)
class Samples:
    """Results in the order of time: answers at batch 1; by batch size, seconds of forward passes and of decoding."""

    answers: list[Generation]
    forward: dict[int, list[float]]
    decode: dict[int, list[float]]


def cost_record(
    runtime: Runtime,
    work: Plan,
    samples: Samples,
    settings: Settings,
    prices: PriceTable | None,
    moment: Moment,
    fresh: Fresh,
    ratios: Sequence[SpeedRatio] = (),
) -> CostRecord:
    """The record of one model.

    Raises:
        UserError: a machine that the price table lacks.
    """
    checkpoint = Checkpoint.open(runtime.path)
    layers = layer_costs(checkpoint, runtime.layers())
    expected = expected_bytes(checkpoint, getattr(torch, runtime.dtype).itemsize)
    reason = fallback_reason(layers, fresh.held_bytes, *expected)
    tokens, following = work.rows.shape[1], work.new_tokens - 1
    prefill = measured([tokens / answer.prefill_seconds for answer in samples.answers])
    decode = measured([following / answer.decode_seconds for answer in samples.answers])
    weights, cache = sum(layer.read_bytes for layer in layers), _cache(runtime)
    kept = None if cache is None else round(cache[1] * (tokens + work.new_tokens / 2))
    throughput = [
        Throughput(what=what, batch=batch, tokens_per_second=measured([batch * count / x for x in seconds]))
        for what, count, series in _series(samples, tokens, following)
        for batch, seconds in series.items()
    ]
    return CostRecord(
        size=size_record(checkpoint, runtime.parameters()),
        workload=Workload(
            prompt_tokens=tokens,
            new_tokens=work.new_tokens,
            batch_sizes=list(work.batch_sizes),
            repeats=len(samples.answers),
            warm_up=WARM_UP,
            runtime=runtime.name,
            device=runtime.device,
            dtype=runtime.dtype,
            threads=torch.get_num_threads(),
            others_busy_cores=moment.others,
            kv_cache=cache[0] if cache else None,
            deterministic=runtime.deterministic,
        ),
        load_seconds=measured(fresh.load_seconds) if fresh.load_seconds else None,
        memory_kind=fresh.memory_kind,
        peak_memory_bytes=fresh.peak_bytes,
        held_memory_bytes=fresh.held_bytes,
        mapped_memory_bytes=fresh.mapped_bytes,
        first_token_seconds=measured([answer.prefill_seconds for answer in samples.answers]),
        prefill_tokens_per_second=prefill,
        decode_tokens_per_second=decode,
        token_latency_seconds=_latency(samples.answers),
        throughput=throughput,
        kernel=runtime.kernel,
        layers=layers,
        read_bytes_per_token=weights,
        cache_read_bytes_per_token=kept,
        read_bandwidth=moment.bandwidth,
        bandwidth_share=decode.median * (weights + (kept or 0)) / moment.bandwidth if moment.bandwidth else None,
        dense_fallback=reason is not None,
        dense_fallback_reason=reason,
        prices=None if prices is None else _price(prices, settings.machine, runtime, prefill, decode, throughput),
        speed_ratios=list(ratios),
    )


def _cache(runtime: Runtime) -> tuple[str, int] | None:
    """How keys and values are kept, and the bytes of a token's; None where transformers keeps them."""
    return (runtime.cache.kind, runtime.model.cache_bytes) if isinstance(runtime, PagedRuntime) else None


def _series(
    samples: Samples, tokens: int, following: int
) -> list[tuple[Literal["batched forward", "batched decode"], int, dict[int, list[float]]]]:
    """(name, tokens of a row, seconds by batch size) of what was run at several batch sizes."""
    return [("batched forward", tokens, samples.forward), ("batched decode", following, samples.decode)]


def _latency(answers: Sequence[Generation]) -> Latency | None:
    """None where the runtime does not time its steps."""
    steps = [seconds for answer in answers for seconds in answer.step_seconds]
    if not steps:
        return None
    p50, p95, p99 = (float(x) for x in np.percentile(steps, [50, 95, 99]))
    return Latency(p50=p50, p95=p95, p99=p99, steps=len(steps))


def _price(
    prices: PriceTable,
    machine: str | None,
    runtime: Runtime,
    prefill: Measured,
    decode: Measured,
    throughput: Sequence[Throughput],
) -> PriceRecord:
    """Both at batch 1, and the best batch of each kind of throughput."""
    speeds: list[tuple[Timed, int, float]] = [("prefill", 1, prefill.median), ("decode", 1, decode.median)]
    for what in dict.fromkeys(each.what for each in throughput):
        best = max((x for x in throughput if x.what == what), key=lambda x: x.tokens_per_second.median)
        speeds.append((what, best.batch, best.tokens_per_second.median))
    return price(prices, prices.choose(runtime.device, machine), speeds)


def speed_ratios(mine: Samples, theirs: Samples) -> list[SpeedRatio]:
    """Baseline over candidate, for all that both were timed at."""
    pairs: list[tuple[Timed, int, Sequence[float], Sequence[float]]] = [
        ("prefill", 1, [x.prefill_seconds for x in mine.answers], [x.prefill_seconds for x in theirs.answers]),
        ("decode", 1, [x.decode_seconds for x in mine.answers], [x.decode_seconds for x in theirs.answers]),
        *(("batched forward", batch, mine.forward[batch], theirs.forward[batch]) for batch in mine.forward),
        *(
            ("batched decode", batch, mine.decode[batch], theirs.decode[batch])
            for batch in mine.decode
            if batch in theirs.decode
        ),
    ]
    found = []
    for what, batch, candidate, baseline in pairs:
        ratios = round_ratios(candidate, baseline)
        interval = median_interval(ratios)
        found.append(
            SpeedRatio(
                what=what,
                batch=batch,
                estimate=interval.estimate,
                low=interval.low,
                high=interval.high,
                level=interval.level,
                ratios=ratios,
            )
        )
    return found

"""`measure`: what a loaded model costs; `measure_pair`: two models in turns, with the ratio of their speeds.

Speeds are medians over at least ten repeats after a warm-up. A pair is measured in the order candidate, baseline,
baseline, candidate, so that a drifting machine favours neither, and its ratio is judged over those rounds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from compress.errors import IntegrityError
from compress.evaluation.costs.assembly import Moment, Samples, Settings, cost_record, speed_ratios
from compress.evaluation.costs.bandwidth import read_bandwidth
from compress.evaluation.costs.fresh import loaded_afresh
from compress.evaluation.costs.limit import Limit
from compress.evaluation.costs.machine import Busy
from compress.evaluation.costs.prices import PriceTable
from compress.evaluation.costs.process import Fresh
from compress.evaluation.costs.record import CostRecord
from compress.evaluation.costs.timing import in_turns, measured
from compress.evaluation.costs.workload import WARM_UP, Plan, plan
from compress.progress import NullProgress, Progress
from compress.runtime.protocol import Generation, Runtime

__all__ = ["Settings", "measure", "measure_pair"]

ANSWERS, BATCHES = 0.4, 0.75
"""Shares of the limit that are spent when the single answers end, and the batches; the fresh process gets the rest."""

T = TypeVar("T")


def measure(
    runtime: Runtime,
    prices: PriceTable | None = None,
    settings: Settings | None = None,
    *,
    progress: Progress | None = None,
) -> CostRecord:
    """Measures one model; money and energy only with `prices`.

    Raises:
        UserError: settings that do not fit the model, a machine that the table lacks.
        WorkError: out of memory, logits that are not finite.
    """
    settings, progress = settings or Settings(), progress or NullProgress()
    if prices is not None:
        prices.choose(runtime.device, settings.machine)  # refuse before the work, not after
    work = _plan(runtime, settings)
    limit = Limit(settings.seconds, _now)
    before = Busy.now()
    (samples,), (work,), bandwidth = _time([runtime], [work], settings, limit, progress)
    moment = Moment(_others(before), bandwidth)
    fresh = _fresh(runtime, work, settings, settings.kernel, settings.kv_cache, limit.left(), progress)
    return cost_record(runtime, work, samples, settings, prices, moment, fresh)


def measure_pair(
    candidate: Runtime,
    baseline: Runtime,
    prices: PriceTable | None = None,
    settings: Settings | None = None,
    *,
    progress: Progress | None = None,
) -> tuple[CostRecord, CostRecord]:
    """Measures two models in turns: (candidate, baseline); the candidate's record holds the ratios to the baseline.

    Raises:
        IntegrityError: tokenizers that differ, so that their tokens are not comparable.
        UserError, WorkError: as `measure`.
    """
    settings, progress = settings or Settings(), progress or NullProgress()
    if prices is not None:
        prices.choose(candidate.device, settings.machine)
    if candidate.tokenizer_digest() != baseline.tokenizer_digest():
        raise IntegrityError(
            "candidate and baseline read text into different tokens, so tokens per second cannot be compared",
            "give the model that the candidate was made from",
        )
    works = [_plan(candidate, settings), _plan(baseline, settings)]
    if not torch.equal(works[0].rows, works[1].rows) or works[0].new_tokens != works[1].new_tokens:
        raise IntegrityError(
            "candidate and baseline have contexts of different length, so they would be given different work",
            "give --prompt-tokens and --new-tokens that fit both",
        )
    limit = Limit(settings.seconds, _now)
    before = Busy.now()
    (mine, theirs), works, bandwidth = _time([candidate, baseline], works, settings, limit, progress)
    moment = Moment(_others(before), bandwidth)
    kernel = settings.baseline_kernel or settings.kernel
    fresh = _fresh(candidate, works[0], settings, settings.kernel, settings.kv_cache, limit.left() / 2, progress)
    other = _fresh(baseline, works[1], settings, kernel, "auto", limit.left(), progress)
    return (
        cost_record(candidate, works[0], mine, settings, prices, moment, fresh, speed_ratios(mine, theirs)),
        cost_record(baseline, works[1], theirs, settings, prices, moment, other),
    )


def _plan(runtime: Runtime, settings: Settings) -> Plan:
    return plan(
        runtime,
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        batch_sizes=settings.batch_sizes,
        repeats=settings.repeats,
    )


def _time(
    runtimes: Sequence[Runtime], works: Sequence[Plan], settings: Settings, limit: Limit, progress: Progress
) -> tuple[list[Samples], list[Plan], float | None]:
    """Runs everything; two models in turns: samples, the work that was done, and bytes per second read meanwhile.

    Batches are decoded by those that decode rows together; by the one alone where the other does not. What does not fit
    the limit is left out, and said: repeats but the first, and batch sizes but the smallest.
    """
    both, batches, repeats = list(zip(runtimes, works, strict=True)), works[0].batch_sizes, works[0].repeats
    together = [i for i, runtime in enumerate(runtimes) if runtime.batched_generate]
    timing = Timing(repeats, limit, progress)
    answers = timing.of("time single answers", [partial(_answer, *each) for each in both], ANSWERS)
    bandwidth = read_bandwidth(runtimes[0].device)
    share = BATCHES if settings.fresh else 1.0
    forward, decode = {}, {}
    for batch in batches:
        forwards = [partial(_forward, *each, batch) for each in both]
        decodes = [partial(_decode, *both[i], batch) for i in together]
        if batch != batches[0] and (why := _too_long([*forwards, *decodes], repeats * len(both), limit, share)):
            left = ", ".join(str(other) for other in batches if other >= batch)
            progress.warn(f"batch sizes {left} left out: {why}")
            break
        where = f"batch {batch}, of {batches[-1]} at most"
        half = (ANSWERS + share) / 2 if batch == batches[0] else share
        forward[batch] = timing.of(f"time prompts, {where}", forwards, half)
        if together:
            decode[batch] = timing.of(f"time decoding, {where}", decodes, share)
    samples = [
        Samples(
            own,
            {batch: runs[i] for batch, runs in forward.items()},
            {batch: runs[together.index(i)] for batch, runs in decode.items() if i in together},
        )
        for i, own in enumerate(answers)
    ]
    return samples, [replace(work, batch_sizes=tuple(forward)) for work in works], bandwidth


class Timing:
    """Runs in turns, as stages of a progress."""

    def __init__(self, repeats: int, limit: Limit, progress: Progress) -> None:
        self._repeats, self._limit, self._progress = repeats, limit, progress

    def of(self, what: str, runs: Sequence[Callable[[], T]], share: float) -> list[list[T]]:
        """The results of `in_turns`; repeats that would end behind this share of the limit are left out."""
        alone = len(runs) == 1
        self._progress.begin(what, WARM_UP * len(runs) + self._repeats * (1 if alone else 2 * len(runs)))
        over = self._limit.part(share).over
        results = in_turns([partial(self._counted, run) for run in runs], self._repeats, WARM_UP, over)
        self._progress.end()
        rounds = len(results[0]) // (1 if alone else 2)
        if rounds < self._repeats:
            level = measured([float(i) for i in range(rounds)]).level
            self._progress.warn(f"{what}: {rounds} of {self._repeats} repeats; intervals at {100 * level:.0f}%")
        return results

    def _counted(self, run: Callable[[], T]) -> T:
        result = run()
        self._progress.advance()
        return result


def _too_long(runs: Sequence[Callable[[], float]], repeats: int, limit: Limit, share: float) -> str | None:
    """Why a batch size does not fit into `share` of the limit, from one run of each; None: it does."""
    if math.isinf(limit.left()):
        return None
    if limit.left(share) <= 0:
        return f"{limit.spent():.0f} s are spent"
    started = time.perf_counter()
    for run in runs:
        run()
    expected = (time.perf_counter() - started) * (WARM_UP + repeats)
    if expected <= limit.left(share):
        return None
    return f"the next alone would take {expected:.0f} s more after {limit.spent():.0f} s"


def _answer(runtime: Runtime, work: Plan) -> Generation:
    (answer,) = runtime.generate([work.prompt], work.sampling)
    return answer


def _forward(runtime: Runtime, work: Plan, batch: int) -> float:
    """Seconds in which `batch` prompts are read: an engine's to their first tokens, elsewhere one forward pass."""
    if runtime.batched_generate:
        return _longest(runtime, work, batch, 1)
    rows = work.rows[:batch]
    started = time.perf_counter()
    runtime.score(rows)
    if runtime.device.startswith("cuda"):
        torch.cuda.synchronize(runtime.device)
    return time.perf_counter() - started


def _decode(runtime: Runtime, work: Plan, batch: int) -> float:
    """Seconds that `batch` answers to different prompts take, less what their first tokens alone take."""
    first, whole = (_longest(runtime, work, batch, tokens) for tokens in (1, work.new_tokens))
    return max(whole - first, 1e-9)


def _longest(runtime: Runtime, work: Plan, batch: int, tokens: int) -> float:
    """Seconds until the last of `batch` answers of so many tokens has ended."""
    params = replace(work.sampling, max_tokens=tokens)
    return max(answer.seconds for answer in runtime.generate(work.rows[:batch].tolist(), params))


def _fresh(
    runtime: Runtime, work: Plan, settings: Settings, kernel: str, kv_cache: str, seconds: float, progress: Progress
) -> Fresh:
    if not settings.fresh:
        return Fresh([], None, None, None, None)
    return loaded_afresh(runtime, work, kernel, kv_cache, seconds, progress)


def _now() -> float:
    return time.perf_counter()


def _others(before: Busy | None) -> float | None:
    after = Busy.now()
    return None if before is None or after is None else round(after.others_since(before), 3)

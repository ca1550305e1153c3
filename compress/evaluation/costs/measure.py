"""`measure`: what a loaded model costs; `measure_pair`: two models in turns, with the ratio of their speeds.

Speeds are medians over at least ten repeats after a warm-up. A pair is measured in the order candidate, baseline,
baseline, candidate, so that a drifting machine favours neither, and its ratio is judged over those rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from compress.errors import IntegrityError
from compress.evaluation.costs.assembly import Samples, Settings, cost_record, speed_ratios
from compress.evaluation.costs.machine import Busy
from compress.evaluation.costs.prices import PriceTable
from compress.evaluation.costs.record import CostRecord
from compress.evaluation.costs.timing import in_turns
from compress.evaluation.costs.workload import WARM_UP, Plan, plan
from compress.progress import NullProgress, Progress
from compress.runtime.protocol import Generation, Runtime

__all__ = ["Settings", "measure", "measure_pair"]


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
    before = Busy.now()
    (samples,), (work,) = _time([runtime], [work], settings.seconds, progress)
    return cost_record(runtime, work, samples, settings, prices, _others(before))


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
    before = Busy.now()
    (mine, theirs), works = _time([candidate, baseline], works, settings.seconds, progress)
    others = _others(before)
    return (
        cost_record(candidate, works[0], mine, settings, prices, others, speed_ratios(mine, theirs)),
        cost_record(baseline, works[1], theirs, settings, prices, others),
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
    runtimes: Sequence[Runtime], works: Sequence[Plan], limit: float | None, progress: Progress
) -> tuple[list[Samples], list[Plan]]:
    """Runs everything; two models in turns. Batch sizes that would go beyond `limit` seconds are left out, and said."""
    both, batches, repeats = list(zip(runtimes, works, strict=True)), works[0].batch_sizes, works[0].repeats
    together = all(runtime.batched_generate for runtime in runtimes)
    started = time.perf_counter()
    progress.begin("time", 1 + len(batches) * (1 + together))
    answers = in_turns([partial(_answer, *each) for each in both], repeats, WARM_UP)
    progress.advance("answers")
    forward, decode = {}, {}
    for batch in batches:
        forwards = [partial(_forward, *each, batch) for each in both]
        decodes = [partial(_decode, *each, batch) for each in both] if together else []
        if limit is not None and batch != batches[0]:
            expected = _once([*forwards, *decodes]) * (WARM_UP + repeats * len(both))
            if (spent := time.perf_counter() - started) + expected > limit:
                left = ", ".join(str(other) for other in batches if other >= batch)
                progress.warn(
                    f"batch sizes {left} left out: {batch} alone would take {expected:.0f} s more after {spent:.0f} s"
                )
                break
        forward[batch] = in_turns(forwards, repeats, WARM_UP)
        progress.advance(f"forward, batch {batch}")
        if together:
            decode[batch] = in_turns(decodes, repeats, WARM_UP)
            progress.advance(f"decode, batch {batch}")
    progress.end()
    samples = [
        Samples(own, {b: runs[i] for b, runs in forward.items()}, {b: runs[i] for b, runs in decode.items()})
        for i, own in enumerate(answers)
    ]
    return samples, [replace(work, batch_sizes=tuple(forward)) for work in works]


def _once(runs: Sequence[Callable[[], float]]) -> float:
    """Seconds that all of them take, each once."""
    started = time.perf_counter()
    for run in runs:
        run()
    return time.perf_counter() - started


def _answer(runtime: Runtime, work: Plan) -> Generation:
    (answer,) = runtime.generate([work.prompt], work.sampling)
    return answer


def _forward(runtime: Runtime, work: Plan, batch: int) -> float:
    """Seconds of one forward pass over `batch` prompts, until the device is done."""
    rows = work.rows[:batch]
    started = time.perf_counter()
    runtime.score(rows)
    if runtime.device.startswith("cuda"):
        torch.cuda.synchronize(runtime.device)
    return time.perf_counter() - started


def _decode(runtime: Runtime, work: Plan, batch: int) -> float:
    """Seconds that `batch` answers to different prompts take, less what their first tokens alone take."""
    prompts = work.rows[:batch].tolist()
    first, whole = (
        max(answer.seconds for answer in runtime.generate(prompts, replace(work.sampling, max_tokens=tokens)))
        for tokens in (1, work.new_tokens)
    )
    return max(whole - first, 1e-9)


def _others(before: Busy | None) -> float | None:
    after = Busy.now()
    return None if before is None or after is None else round(after.others_since(before), 3)

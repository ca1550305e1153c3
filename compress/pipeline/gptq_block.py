"""GPTQ: one pass through the block, pausing at each linear; the original block runs beside it to know its errors."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from contextlib import closing
from dataclasses import dataclass

from torch import Tensor

from compress.calibration.staged import StagedForward
from compress.calibration.statistics import collect
from compress.models.skeleton import LinearSpec
from compress.pipeline import curvature
from compress.pipeline.block import BlockResult, OpenBlock, Workers, open_block
from compress.pipeline.inputs import Activations
from compress.pipeline.job import Job
from compress.pipeline.joint import Pruned, pruned_before
from compress.pipeline.kv_ranges import KvRanges
from compress.pipeline.linears import (
    ROWS_PER_TILE,
    UNSEEN,
    QuantizedLinear,
    finished,
    in_tiles,
    join,
    put,
    round_searched,
    rounded,
)
from compress.pipeline.ranges import shared_ranges
from compress.pipeline.rounded_inputs import RoundedInputs
from compress.pipeline.routing import Routing
from compress.pipeline.stream import missed
from compress.pipeline.twin import Pair, pairs, streams_of, twin_of
from compress.pipeline.zeros import held
from compress.pruning import magnitude
from compress.quantization import coupled, gptq, gptq_floats
from compress.quantization.configs import GptqConfig
from compress.types import BlockFloatScheme, Fp8Scheme, NormalFloatScheme, QuantizedTensor


@dataclass(frozen=True, eq=False, slots=True)
class _Linear:
    """One linear on its way to codes.

    weight: (out, in) float32. pruned: zeros that came before. lost: as `Preconditioner.corrected` takes it.
    together: the curvature over the outputs, as `coupled` takes it. highest: as `shared_ranges` gives it.
    """

    spec: LinearSpec
    weight: Tensor
    pruned: Pruned | None
    lost: Tensor | None
    together: Tensor | None
    highest: float | None


def through_block(
    job: Job,
    method: GptqConfig,
    specs: Sequence[LinearSpec],
    block: int,
    entering: Activations,
    workers: Workers,
    opened: OpenBlock | None = None,
) -> BlockResult:
    """One pass through the block, pausing at each linear; the original block runs beside it where errors are undone.

    opened: the block as a method before left it; None: as the source has it.
    """
    opened, result = opened or open_block(job, block), BlockResult()
    live = opened.live
    by_name = {spec.name: spec for spec in specs}
    highest = shared_ranges(job, specs, block, opened)
    rounding = RoundedInputs(job, live)
    cached = KvRanges(job, opened)
    routing = Routing.of(job.stage.calibration, opened.module)
    streams = streams_of(job, entering, block)
    watched = {**routing.watched, **({} if streams is None else streams[0].watched(live))}
    watched |= {name: live[name] for name in by_name}
    forward = StagedForward(entering.runs(job.skeleton, opened.module), watched, workers.count)
    twin = twin_of(job, entering, specs, block, workers, streams)
    together = curvature.of_block(job, block)
    shared: gptq.Preconditioner | None = None
    report: Future[QuantizedLinear] | None = None
    with closing(pairs(forward, twin, entering, specs, opened.input_scales, routing, streams)) as reached:
        for pair in reached:
            stage, spec = pair.stage, by_name.pop(pair.stage.name)
            reading = workers.pool.submit(opened.weight, job, spec)
            rounding.calibrate(spec, stage.inputs)
            sampling = workers.pool.submit(_samples_of_both, rounding, pair)
            fresh = shared is None or not stage.same_input
            stats, before = None, pair.before
            lost: Tensor | None = None
            if fresh or before[1]:
                multiplied = rounding.rounded_chunks(spec.name, stage.inputs, workers.pool)
                if fresh:
                    stats = collect(multiplied, pair.originals, workers.pool)
                if before[1]:
                    lost = missed(*before, {place: multiplied[place] for place in before[1]}, workers.pool)
            if twin is not None and pair.counterpart is not None:
                twin.resume(pair.counterpart)  # runs beside the factorisation, which does not keep all workers busy
            if stats is not None:
                shared = gptq.Preconditioner(stats, method, workers.pool)
            assert shared is not None
            weight = reading.result()
            pruned = pruned_before(method, weight, shared, workers.pool, lost, spec.name in job.sparse)
            linear = _Linear(spec, weight, pruned, lost, together.get(spec.name), highest.get(spec.name))
            quantized = _quantized(job, method, linear, shared, workers.pool)
            put(live[spec.name], quantized)
            forward.resume(stage)
            if report is not None:  # one at a time, because each holds a whole weight
                result.linears.append(report.result())
            report = workers.pool.submit(
                _reported, job, method, linear, quantized, shared, sampling.result(), rounding.scale(spec.name)
            )
    if report is not None:
        result.linears.append(report.result())
    for spec in by_name.values():  # experts that no token of the calibration text reached
        weight, sparsity = opened.weight(job, spec), method.to_sparsity()
        gone = None if sparsity is None else magnitude.mask(weight, sparsity)
        result.linears.append(rounded(job, spec, weight, UNSEEN, workers.pool, highest.get(spec.name), pruned=gone))
    result.linears = [routing.noted(linear) for linear in result.linears]
    routing.close()
    result.added = cached.scales()
    result.activations = entering.advanced(forward.outputs, [] if twin is None else twin.outputs)
    return result


def _quantized(
    job: Job, method: GptqConfig, linear: _Linear, shared: gptq.Preconditioner, pool: Executor
) -> QuantizedTensor:
    spec, pruned = linear.spec, linear.pruned
    dtype, scheme = job.scale_dtype(spec), job.schemes[spec.name]
    if shared.factored is None:
        stays = linear.weight if pruned is None else linear.weight.masked_fill(pruned.zeros, 0.0)
        return round_searched(job, spec, stays, pool, linear.highest)
    assert not isinstance(scheme, Fp8Scheme | NormalFloatScheme)  # recipes refuse it
    shared.prepare(scheme.groups(spec.in_features), pool)
    target = linear.weight if pruned is None else pruned.target
    if pruned is None or not pruned.corrected:
        target = shared.corrected(target, pool, linear.lost)
    zeros = None if pruned is None else pruned.zeros
    if isinstance(scheme, BlockFloatScheme):
        tall, top = gptq_floats.ROWS_PER_TILE, linear.highest
        found = in_tiles(target, lambda rows: gptq_floats.transform(rows, shared, scheme, method, top), pool, tall)
        return found if zeros is None else held(spec.name, found, zeros)[0]
    rows = target.split(ROWS_PER_TILE)
    tiles = pool.map(
        lambda part, gone: gptq.transform(part, shared, scheme, method, dtype, gone),
        rows, [None] * len(rows) if zeros is None else zeros.split(ROWS_PER_TILE),
    )  # fmt: skip
    found = join(list(tiles))
    if linear.together is None:
        return found
    return coupled.descend(found, target, shared.hessian, linear.together, zeros)


def _samples_of_both(rounding: RoundedInputs, pair: Pair) -> tuple[Tensor, Tensor | None]:
    """Some inputs of the linear, as it multiplies them, and in the original model, for the same tokens.

    Where the original is not followed, the second is what the inputs were before rounding, or None if they stay so.
    """
    sample, original = pair.samples()
    multiplied = rounding.rounded(pair.stage.name, sample)
    if original is None and multiplied is not sample:
        original = sample
    return multiplied, original


def _reported(
    job: Job,
    method: GptqConfig,
    linear: _Linear,
    quantized: QuantizedTensor,
    shared: gptq.Preconditioner,
    samples: tuple[Tensor, Tensor | None],
    input_scale: Tensor | None,
) -> QuantizedLinear:
    """With its report; samples (tokens, in) are the inputs of both models for the same tokens."""
    spec, weight = linear.spec, linear.weight
    pruned = None if linear.pruned is None else linear.pruned.zeros
    if shared.factored is None:
        reason = "no damping makes its Hessian positive definite"
        return finished(job, spec, quantized, weight, fallback=("rtn", reason), input_scale=input_scale, pruned=pruned)
    damp_frac = shared.factored.damp_frac
    raised = ("damping raised", f"the Hessian needed damping {damp_frac:g}") if damp_frac > method.damp_frac else None
    details: dict[str, float | int | str | bool | None] = {
        "damp_frac": damp_frac,
        "tokens": shared.stats.tokens,
        "corrected": shared.correction is not None,
    }
    if job.curvature is not None:  # whether its rows knew of each other
        details["coupled"] = linear.together is not None
    return finished(
        job, spec, quantized, weight, *samples, fallback=raised,
        details=details, input_scale=input_scale, pruned=pruned,
    )  # fmt: skip

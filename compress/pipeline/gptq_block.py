"""GPTQ: one pass through the block, pausing at each linear; the original block runs beside it to know its errors."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import closing

from torch import Tensor

from compress.calibration.staged import StagedForward
from compress.calibration.statistics import collect
from compress.models.skeleton import LinearSpec
from compress.pipeline.block import BlockResult, Workers, stages
from compress.pipeline.inputs import Activations
from compress.pipeline.job import Job
from compress.pipeline.linears import UNSEEN, QuantizedLinear, finished, in_tiles, put, rounded, sample_of
from compress.pipeline.source import read_weight
from compress.quantization import gptq
from compress.quantization.configs import GptqConfig


def through_block(
    job: Job,
    method: GptqConfig,
    specs: Sequence[LinearSpec],
    block: int,
    entering: Activations,
    workers: Workers,
) -> BlockResult:
    """One pass through the block, pausing at each linear; the original block runs beside it where errors are undone."""
    skeleton, result = job.skeleton, BlockResult()
    module = skeleton.materialise(block)
    live = skeleton.modules(block, module)
    by_name = {spec.name: spec for spec in specs}
    forward = StagedForward(
        entering.runs(skeleton, module, entering.quantized), {name: live[name] for name in by_name}, workers.count
    )
    twin: StagedForward | None = None
    if entering.original is not None:
        original = skeleton.materialise(block)
        beside = skeleton.modules(block, original)
        # Tokens of an expert differ between the two models, so experts have no counterpart to compare with.
        watched = {name: beside[name] for name, spec in by_name.items() if spec.expert is None}
        twin = StagedForward(entering.runs(skeleton, original, entering.original), watched, workers.count)
    shared: gptq.Preconditioner | None = None
    with closing(stages(forward)) as reached, closing(stages(twin)) as counterparts:
        for stage in reached:
            spec = by_name.pop(stage.name)
            originals = None
            if twin is not None and spec.expert is None:
                counterpart = next(counterparts)
                assert counterpart.name == stage.name, "the two models must meet their linears in one order"
                originals = counterpart.inputs
            if shared is None or not stage.same_input:
                shared = gptq.Preconditioner(collect(stage.inputs, originals, workers.pool), method)
            linear = _linear(job, method, spec, shared, stage.inputs, originals, workers.pool)
            put(live[spec.name], linear.quantized)
            result.linears.append(linear)
        for _ in counterparts:  # lets the original block run to its end
            pass
    for spec in by_name.values():  # experts that no token of the calibration text reached
        result.linears.append(rounded(job, spec, read_weight(job.checkpoint, spec), UNSEEN, workers.pool))
    outputs = twin.outputs if twin is not None else None
    result.activations = entering.advanced(forward.outputs, outputs)
    return result


def _linear(
    job: Job,
    method: GptqConfig,
    spec: LinearSpec,
    shared: gptq.Preconditioner,
    inputs: list[Tensor],
    originals: list[Tensor] | None,
    pool: Executor,
) -> QuantizedLinear:
    weight, dtype, scheme = read_weight(job.checkpoint, spec), job.scale_dtype(spec), job.schemes[spec.name]
    if shared.factored is None:
        return rounded(job, spec, weight, "no damping makes its Hessian positive definite", pool)
    shared.inverse_blocks(scheme.groups(spec.in_features))  # computed once, before the tiles need it
    quantized = in_tiles(weight, lambda rows: gptq.transform(rows, shared, scheme, method, dtype), pool)
    raised = shared.factored.damp_frac > method.damp_frac
    reason = f"the Hessian needed damping {shared.factored.damp_frac:g}" if raised else None
    reference = None if originals is None else sample_of(originals)
    return finished(
        job, spec, quantized, weight, sample_of(inputs), reference,
        fallback=("damping raised", reason) if reason else None,
        details={"damp_frac": shared.factored.damp_frac, "tokens": shared.stats.tokens},
    )  # fmt: skip

"""Methods that look at weights alone, rtn, hqq and ternary.

Data-free, so the block is never built unless the scheme stores calibrated scales of inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import closing

from torch import Tensor

from compress.calibration.staged import StagedForward
from compress.models.skeleton import LinearSpec
from compress.pipeline.block import BlockResult, OpenBlock, Workers, open_block, stages
from compress.pipeline.inputs import Activations
from compress.pipeline.job import Job
from compress.pipeline.kv_ranges import KvRanges
from compress.pipeline.linears import finished, in_tiles, put, sample_of
from compress.pipeline.ranges import shared_ranges
from compress.pipeline.rounded_inputs import RoundedInputs
from compress.pipeline.source import read_weight
from compress.quantization import hqq, rtn, ternary
from compress.quantization.configs import HqqConfig, RtnConfig, TernaryConfig
from compress.types import Fp8Scheme, NormalFloatScheme, QuantizedTensor

DataFree = RtnConfig | HqqConfig | TernaryConfig


def without_data(job: Job, method: DataFree, specs: Sequence[LinearSpec], block: int, workers: Workers) -> BlockResult:
    """Rounds every linear of the block."""
    result, highest = BlockResult(), shared_ranges(job, specs, block)
    for spec in specs:
        weight = read_weight(job.checkpoint, spec)
        quantized = _rounded(job, method, spec, weight, highest.get(spec.name), workers.pool)
        result.linears.append(finished(job, spec, quantized, weight))
    return result


def through_block(
    job: Job,
    method: DataFree,
    specs: Sequence[LinearSpec],
    block: int,
    entering: Activations,
    workers: Workers,
    opened: OpenBlock | None = None,
) -> BlockResult:
    """One pass through the block, pausing at each linear for the scale of its inputs; `opened` as a method before
    left it, None: as the source has it."""
    opened, result = opened or open_block(job, block), BlockResult()
    highest = shared_ranges(job, specs, block, opened)
    by_name = {spec.name: spec for spec in specs}
    rounding = RoundedInputs(job, opened.live)
    cached = KvRanges(job, opened)
    watched = {name: opened.live[name] for name in by_name}
    forward = StagedForward(entering.runs(job.skeleton, opened.module), watched, workers.count)
    with closing(stages(forward)) as reached:
        for stage in reached:
            spec = by_name.pop(stage.name)
            rounding.calibrate(spec, stage.inputs)
            weight, sample = opened.weight(job, spec), sample_of(stage.inputs)
            quantized = _rounded(job, method, spec, weight, highest.get(spec.name), workers.pool)
            put(opened.live[spec.name], quantized)
            result.linears.append(
                finished(
                    job,
                    spec,
                    quantized,
                    weight,
                    rounding.rounded(spec.name, sample),
                    sample,
                    input_scale=rounding.scale(spec.name),
                )
            )
    for spec in by_name.values():  # reached by no token, which only scales of static inputs mind
        weight = opened.weight(job, spec)
        quantized = _rounded(job, method, spec, weight, highest.get(spec.name), workers.pool)
        result.linears.append(finished(job, spec, quantized, weight, input_scale=rounding.scale(spec.name)))
    result.added = cached.scales()
    result.activations = entering.advanced(forward.outputs)
    return result


def _rounded(
    job: Job, method: DataFree, spec: LinearSpec, weight: Tensor, highest: float | None, pool: Executor
) -> QuantizedTensor:
    scheme, dtype = job.schemes[spec.name], job.scale_dtype(spec)
    if isinstance(method, TernaryConfig):  # one scale for all rows
        return ternary.transform(weight, job.integers(spec), dtype)
    if isinstance(method, HqqConfig):
        return in_tiles(weight, lambda rows: hqq.transform(rows, job.integers(spec), method, dtype), pool)
    # Scales may be shared between rows, so these are not cut into tiles of them.
    if isinstance(scheme, Fp8Scheme | NormalFloatScheme):
        return rtn.transform(weight, scheme, method, dtype, highest)
    return in_tiles(weight, lambda rows: rtn.transform(rows, scheme, method, dtype, highest), pool)

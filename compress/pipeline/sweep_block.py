"""Scale sweeps: one pass through the block, pausing at each linear for the second moments of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from torch import Tensor

from compress.calibration.staged import StagedForward
from compress.calibration.statistics import GroupStats, collect_groups
from compress.models.skeleton import LinearSpec
from compress.pipeline.block import BlockResult, Workers, open_block, stages
from compress.pipeline.inputs import Activations
from compress.pipeline.job import Job
from compress.pipeline.kv_ranges import KvRanges
from compress.pipeline.linears import UNSEEN, finished, in_tiles, put, rounded, sample_of
from compress.pipeline.ranges import shared_ranges
from compress.pipeline.rounded_inputs import RoundedInputs
from compress.quantization import sweep
from compress.quantization.configs import SweepConfig
from compress.types import Fp8Scheme, NormalFloatScheme, QuantizedTensor


def through_block(
    job: Job, method: SweepConfig, specs: Sequence[LinearSpec], block: int, entering: Activations, workers: Workers
) -> BlockResult:
    """Every linear sees its inputs behind the linears before it as already quantised."""
    opened, result = open_block(job, block), BlockResult()
    highest = shared_ranges(job, specs, block, opened)
    by_name = {spec.name: spec for spec in specs}
    rounding = RoundedInputs(job, opened.live)
    cached = KvRanges(job, opened)
    watched = {name: opened.live[name] for name in by_name}
    forward = StagedForward(entering.runs(job.skeleton, opened.module), watched, workers.count)
    stats: GroupStats | None = None
    with closing(stages(forward)) as reached:
        for stage in reached:
            spec = by_name.pop(stage.name)
            scheme, dtype = job.schemes[spec.name], job.scale_dtype(spec)
            assert not isinstance(scheme, Fp8Scheme | NormalFloatScheme)  # recipes refuse it
            rounding.calibrate(spec, stage.inputs)
            if stats is None or not stage.same_input:
                multiplied = rounding.rounded_chunks(spec.name, stage.inputs, workers.pool)
                stats = collect_groups(multiplied, scheme.groups(spec.in_features), workers.pool)
            weight, sample = opened.weight(job, spec), sample_of(stage.inputs)
            moments, largest = stats.blocks, highest.get(spec.name)

            def round_rows(rows: Tensor) -> QuantizedTensor:
                return sweep.transform(rows, scheme, moments, dtype, largest)  # noqa: B023

            quantized = in_tiles(weight, round_rows, workers.pool)
            put(opened.live[spec.name], quantized)
            inputs, scale = rounding.rounded(spec.name, sample), rounding.scale(spec.name)
            result.linears.append(finished(job, spec, quantized, weight, inputs, sample, input_scale=scale))
    for spec in by_name.values():  # experts that no token of the calibration text reached
        weight = opened.weight(job, spec)
        result.linears.append(rounded(job, spec, weight, UNSEEN, workers.pool, highest.get(spec.name)))
    result.added = cached.scales()
    result.activations = entering.advanced(forward.outputs)
    return result

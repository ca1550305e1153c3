"""Round to nearest: no activations, so the block is never built."""

from __future__ import annotations

from collections.abc import Sequence

from compress.models.skeleton import LinearSpec
from compress.pipeline.block import BlockResult, Workers
from compress.pipeline.job import Job
from compress.pipeline.linears import finished, in_tiles
from compress.pipeline.source import read_weight
from compress.quantization import rtn
from compress.quantization.configs import RtnConfig


def through_block(job: Job, method: RtnConfig, specs: Sequence[LinearSpec], workers: Workers) -> BlockResult:
    """Rounds every linear of the block."""
    result = BlockResult()
    for spec in specs:
        weight, dtype, scheme = read_weight(job.checkpoint, spec), job.scale_dtype(spec), job.schemes[spec.name]
        quantized = in_tiles(weight, lambda rows: rtn.transform(rows, scheme, method, dtype), workers.pool)  # noqa: B023
        result.linears.append(finished(job, spec, quantized, weight))
    return result

"""A quantising stage in the loop over blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from compress.pipeline import (
    autoround_block,
    awq_block,
    gptq_block,
    hadamard_block,
    output,
    rtn_block,
    smoothquant_block,
    sweep_block,
)
from compress.pipeline.block import BlockResult, Workers
from compress.pipeline.inputs import Activations
from compress.pipeline.job import Job
from compress.pipeline.kinds import Kind, Written
from compress.pipeline.source import read_finite
from compress.quantization.configs import (
    AutoRoundConfig,
    AwqConfig,
    GptqConfig,
    HadamardConfig,
    HqqConfig,
    RtnConfig,
    SmoothQuantConfig,
    SweepConfig,
    TernaryConfig,
)

THROUGH: dict[type[Any], Callable[..., BlockResult]] = {
    RtnConfig: rtn_block.through_block,
    HqqConfig: rtn_block.through_block,
    SweepConfig: sweep_block.through_block,
    TernaryConfig: rtn_block.through_block,
    GptqConfig: gptq_block.through_block,
    AutoRoundConfig: autoround_block.through_block,
    AwqConfig: awq_block.through_block,
    SmoothQuantConfig: smoothquant_block.through_block,
    HadamardConfig: hadamard_block.through_block,
}
"""What takes a block through each method: (job, method, specs, block, entering, workers) -> BlockResult."""


class QuantizeKind(Kind[Job]):
    """As `kinds.Kind` has it."""

    def doing(self, job: Job) -> str:
        return f"quantising blocks ({job.method_name} {job.label})"

    def through_block(self, job: Job, block: int, entering: Activations | None, workers: Workers) -> Written:
        result = _quantized(job, block, entering, workers)
        tensors, fate = output.block_tensors(job, block, result, workers.pool)
        return Written(
            tensors,
            fate,
            layers=[linear.record for linear in result.linears],
            fallbacks=[*result.fallbacks, *(f for linear in result.linears for f in linear.fallbacks)],
            activations=result.activations,
        )

    def config(self, job: Job) -> dict[str, Any]:
        return output.config(job)


def _quantized(job: Job, block: int, entering: Activations | None, workers: Workers) -> BlockResult:
    specs = [spec for spec in job.skeleton.linears(block) if spec.name in job.schemes]
    method = job.stage.method
    if entering is None:
        assert isinstance(method, rtn_block.DataFree)
        return rtn_block.without_data(job, method, specs, block, workers)
    list(workers.pool.map(lambda name: read_finite(job.checkpoint, name), job.skeleton.block_tensors(block)))
    return THROUGH[type(method)](job, method, specs, block, entering, workers)

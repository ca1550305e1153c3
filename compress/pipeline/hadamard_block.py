"""Rotations: the model's own tensors come turned already, so a block goes straight to the method that rounds it."""

from __future__ import annotations

from collections.abc import Sequence

from compress.models.skeleton import LinearSpec
from compress.pipeline.block import BlockResult, Workers, open_block
from compress.pipeline.handover import Folded, rounded
from compress.pipeline.inputs import Activations
from compress.pipeline.job import Job
from compress.pipeline.rotated import Rotated, check
from compress.quantization.configs import HadamardConfig


def through_block(
    job: Job,
    method: HadamardConfig,
    specs: Sequence[LinearSpec],
    block: int,
    entering: Activations,
    workers: Workers,
) -> BlockResult:
    """One pass through the rotated block. Before the first one, the rotated float model is held against the source."""
    if block == 0:
        assert job.calibration is not None
        assert isinstance(job.checkpoint, Rotated)
        check(method, job.checkpoint.source, job.recipe.seed, job.calibration.tokens[:1])
    return rounded(job, method.rounding, specs, block, entering, workers, Folded(open_block(job, block)))

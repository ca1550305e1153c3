"""A stage that sets weights to zero, in the loop over blocks."""

from __future__ import annotations

from typing import Any

from compress.pipeline import allocation, mask_block, output
from compress.pipeline.block import Workers
from compress.pipeline.inputs import Activations
from compress.pipeline.kinds import Fate, Kind, Written
from compress.pipeline.masked import PrunedLinear
from compress.pipeline.prune_job import PruneJob
from compress.pipeline.source import read_finite
from compress.progress import Progress
from compress.pruning.configs import MagnitudeConfig


class PruneKind(Kind[PruneJob]):
    """As `kinds.Kind` has it."""

    def decide(self, job: PruneJob, workers: Workers, progress: Progress) -> dict[str, Any] | None:
        return allocation.decide(job, workers, progress)

    def doing(self, job: PruneJob) -> str:
        return f"pruning blocks ({job.method_name} {job.sparsity.name})"

    def through_block(self, job: PruneJob, block: int, entering: Activations | None, workers: Workers) -> Written:
        specs = [spec for spec in job.skeleton.linears(block) if spec.name in job.sparsities]
        method = job.stage.method
        if isinstance(method, MagnitudeConfig):
            linears, leaving = mask_block.by_magnitude(job, specs), None
        else:
            assert entering is not None
            assert isinstance(method, mask_block.Scored)
            list(workers.pool.map(lambda name: read_finite(job.checkpoint, name), job.skeleton.block_tensors(block)))
            linears, leaving = mask_block.through_block(job, method, specs, block, entering, workers)
        return _written(job, block, linears, leaving)

    def config(self, job: PruneJob) -> dict[str, Any]:
        """The source's: zeros change no shape."""
        return dict(job.checkpoint.config)


def _written(job: PruneJob, block: int, linears: list[PrunedLinear], leaving: Activations | None) -> Written:
    tensors = {linear.spec.weight: linear.as_stored() for linear in linears}
    fate: Fate = {name: ("pruned", [name]) for name in tensors}
    rest = [name for name in job.skeleton.block_tensors(block) if name not in fate]
    tensors, fate = output.keep(job, rest, tensors, fate)
    return Written(
        tensors,
        fate,
        layers=[linear.record for linear in linears],
        fallbacks=[fallback for linear in linears for fallback in linear.fallbacks],
        activations=leaving,
    )

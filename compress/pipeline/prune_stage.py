"""A stage that sets weights to zero, in the loop over blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from compress.artifact.reader import Artifact
from compress.errors import CompressError, WorkError
from compress.formats import bitmask
from compress.formats.compressed_tensors import for_own_reader
from compress.models.checkpoint import Checkpoint
from compress.models.skeleton import Skeleton
from compress.pipeline import allocation, mask_block, mask_moments, output
from compress.pipeline.block import Workers
from compress.pipeline.inputs import Activations
from compress.pipeline.kinds import Fate, Kind, Written
from compress.pipeline.masked import PrunedLinear
from compress.pipeline.prune_job import PruneJob
from compress.pipeline.source import read_finite
from compress.progress import Progress
from compress.pruning.configs import MagnitudeConfig, from_model


class PruneKind(Kind[PruneJob]):
    """As `kinds.Kind` has it."""

    def decide(self, job: PruneJob, workers: Workers, progress: Progress) -> dict[str, Any] | None:
        if from_model(job.stage.method):
            mask_moments.complete(job, workers, progress)
        return allocation.decide(job, workers, progress)

    def doing(self, job: PruneJob) -> str:
        return f"pruning blocks ({job.method_name} {job.sparsity.name})"

    def through_block(self, job: PruneJob, block: int, entering: Activations | None, workers: Workers) -> Written:
        specs = [spec for spec in job.skeleton.linears(block) if spec.name in job.sparsities]
        method = job.stage.method
        if isinstance(method, MagnitudeConfig):
            linears, leaving = mask_block.by_magnitude(job, specs), None
        elif from_model(method):
            assert isinstance(method, mask_block.Scored)
            if entering is None:
                found, leaving = mask_moments.kept(job, block), None
            else:
                found, leaving = mask_moments.measured(job, block, entering, workers)
            linears = mask_block.by_moments(job, method, specs, found, workers)
        else:
            assert entering is not None
            assert isinstance(method, mask_block.Scored)
            list(workers.pool.map(lambda name: read_finite(job.checkpoint, name), job.skeleton.block_tensors(block)))
            linears, leaving = mask_block.through_block(job, method, specs, block, entering, workers)
        return _written(job, block, linears, leaving)

    def config(self, job: PruneJob) -> dict[str, Any]:
        """The source's: zeros change no shape. What transformers cannot read names our reader, and is refused there."""
        config = dict(job.checkpoint.config)
        if job.stage.format == bitmask.FORMAT:
            config["quantization_config"] = for_own_reader({"format": bitmask.FORMAT, "config_groups": {}})
        return config

    def check(self, job: PruneJob, directory: Path, leaving: Activations | None) -> None:
        """Refuses a directory in which transformers would not find each tensor in its place, or in which a linear has
        other zeros than its report says; one tensor is in memory at a time. What is packed our reader alone can open.

        Raises WorkError.
        """
        if job.stage.format != "dense":
            return
        written = Checkpoint.open(directory)
        hint = "nothing was published; report this model's config.json"
        try:
            Skeleton(written, job.skeleton.dtype)
        except CompressError as error:
            raise WorkError(f"transformers would not load the pruned model: {error.message}", hint) from error
        for layer in Artifact.open(directory).layers():
            zeros = layer["details"].get("zeros")
            if zeros is not None and int((written.read(f"{layer['name']}.weight") == 0).sum()) != zeros:
                raise WorkError(f"{layer['name']} was written with other zeros than it was given", hint)


def _written(job: PruneJob, block: int, linears: list[PrunedLinear], leaving: Activations | None) -> Written:
    tensors: dict[str, Tensor] = {}
    fate: Fate = {}
    for linear in linears:
        stored = _stored(job, linear)
        tensors |= stored
        fate[linear.spec.weight] = ("pruned", list(stored))
    rest = [name for name in job.skeleton.block_tensors(block) if name not in fate]
    tensors, fate = output.keep(job, rest, tensors, fate)
    return Written(
        tensors,
        fate,
        layers=[linear.record for linear in linears],
        fallbacks=[fallback for linear in linears for fallback in linear.fallbacks],
        activations=leaving,
    )


def _stored(job: PruneJob, linear: PrunedLinear) -> dict[str, Tensor]:
    """What is written of one linear, by its name in the artifact; packed where that is asked for and smaller."""
    weight = linear.as_stored()
    if job.stage.format == bitmask.FORMAT and bitmask.smaller(weight):
        return {f"{linear.spec.name}.{part}": tensor for part, tensor in bitmask.pack(weight).items()}
    return {linear.spec.weight: weight}

"""A width cut in the loop over blocks, and the check that what was written is the model that was cut."""

from __future__ import annotations

from typing import Any

from compress.pipeline import output, width_block
from compress.pipeline.block import Workers
from compress.pipeline.cut_stage import CutKind
from compress.pipeline.inputs import Activations
from compress.pipeline.kinds import Fate, Written
from compress.pipeline.source import read_finite
from compress.pipeline.width_job import WidthJob, config_of


class WidthKind(CutKind[WidthJob]):
    """As `kinds.Kind` has it."""

    def doing(self, job: WidthJob) -> str:
        return f"cutting blocks ({job.cut.neurons} of {job.cut.all_neurons} neurons)"

    def through_block(self, job: WidthJob, block: int, entering: Activations | None, workers: Workers) -> Written:
        assert entering is not None
        list(workers.pool.map(lambda name: read_finite(job.checkpoint, name), job.skeleton.block_tensors(block)))
        narrow = width_block.through_block(job, block, entering, workers)
        fate: Fate = {name: ("repaired" if name in narrow.repaired else "pruned", [name]) for name in narrow.tensors}
        rest = [name for name in job.skeleton.block_tensors(block) if name not in fate]
        tensors, fate = output.keep(job, rest, narrow.tensors, fate)
        return Written(tensors, fate, layers=narrow.layers, activations=narrow.activations)

    def config(self, job: WidthJob) -> dict[str, Any]:
        return config_of(job)

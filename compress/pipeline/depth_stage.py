"""A depth cut in the loop over blocks: blocks that stay are stored under new numbers, and nothing in them changes."""

from __future__ import annotations

from typing import Any

from compress.artifact.layers import LayerRecord
from compress.pipeline import depth_choice
from compress.pipeline.block import Workers
from compress.pipeline.cut_stage import CutKind
from compress.pipeline.depth_job import DepthJob, config_of
from compress.pipeline.inputs import Activations
from compress.pipeline.kinds import Fate, Written
from compress.pipeline.source import read_finite
from compress.progress import Progress


class DepthKind(CutKind[DepthJob]):
    """As `kinds.Kind` has it."""

    def doing(self, job: DepthJob) -> str:
        return f"keeping {len(job.kept)} of {job.cut.blocks} blocks"

    def decide(self, job: DepthJob, workers: Workers, progress: Progress) -> dict[str, Any]:
        return depth_choice.decide(job, workers, progress)

    def through_block(self, job: DepthJob, block: int, entering: Activations | None, workers: Workers) -> Written:
        assert entering is not None
        skeleton, names = job.skeleton, job.skeleton.block_tensors(block)
        if block in job.dropped:
            fate: Fate = {name: ("dropped", []) for name in names}
            return Written({}, fate, layers=[_report(job, block)], activations=entering.advanced(entering.quantized))
        new, old = skeleton.block_prefix(job.kept.index(block)), skeleton.block_prefix(block)
        renamed = {name: new + name.removeprefix(old) for name in names}
        tensors = {new: read_finite(job.checkpoint, name) for name, new in renamed.items()}
        module = skeleton.materialise(block)
        leaving = list(workers.pool.map(lambda run: run(), entering.runs(skeleton, module)))
        fate = {name: ("kept", [new]) for name, new in renamed.items()}
        return Written(tensors, fate, activations=entering.advanced(leaving))

    def config(self, job: DepthJob) -> dict[str, Any]:
        return config_of(job)


def _report(job: DepthJob, block: int) -> LayerRecord:
    """A block that goes, in one record, with the measure that chose it."""
    lost = (job.cut.all_parameters - job.cut.parameters) // job.cut.drop
    measure = job.method.choose
    return LayerRecord(
        name=job.skeleton.block_prefix(block).rstrip("."),
        block=block,
        method=job.method_name,
        scheme=job.label,
        details={"removed": lost, measure: job.decided[measure][str(block)]},
    )

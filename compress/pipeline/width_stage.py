"""A width cut in the loop over blocks, and the check that what was written is the model that was cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from compress.artifact.cut import CUT_NAME
from compress.models.checkpoint import Checkpoint
from compress.pipeline import (
    mask_moments,
    output,
    width_block,
    width_channels,
    width_gradients,
    width_norms,
    width_plain,
)
from compress.pipeline.block import Workers
from compress.pipeline.cut_stage import CutKind
from compress.pipeline.inputs import Activations
from compress.pipeline.kinds import Fate, Written
from compress.pipeline.source import read_finite
from compress.pipeline.width_job import WidthJob, config_of
from compress.progress import Progress


class WidthKind(CutKind[WidthJob]):
    """As `kinds.Kind` has it."""

    def doing(self, job: WidthJob) -> str:
        return f"cutting blocks ({job.cut.neurons} of {job.cut.all_neurons} neurons)"

    def decide(self, job: WidthJob, workers: Workers, progress: Progress) -> dict[str, Any] | None:
        if job.moments is not None:
            mask_moments.complete(job, workers, progress)
        found = width_channels.decide(job, workers, progress)
        if not job.method.first_order:
            return found
        return {**(found or {}), **width_gradients.decide(job, workers, progress)}

    def outer(self, job: WidthJob, tensors: dict[str, Tensor], fate: Fate) -> tuple[dict[str, Tensor], Fate]:
        if job.channels is None:
            return tensors, fate
        last, _ = width_norms.final_norm(job)  # it is mended behind the last block
        narrow = {name: width_norms.narrow_table(job, name, t) for name, t in tensors.items() if name != last}
        return narrow, {name: ("pruned", into) if name in narrow else (action, into)
                        for name, (action, into) in fate.items() if name != last}  # fmt: skip

    def through_block(self, job: WidthJob, block: int, entering: Activations | None, workers: Workers) -> Written:
        assert entering is not None
        names = job.skeleton.block_tensors(block)
        list(workers.pool.map(lambda name: read_finite(job.checkpoint, name), names))
        if block == 0:
            entering = width_channels.masked(job, entering)
        narrow = width_block.through_block(job, block, entering, workers)
        attachments = {}
        if block == job.skeleton.num_blocks - 1:
            assert narrow.activations is not None
            norm = None
            if job.cut.narrows:
                last, _ = width_norms.final_norm(job)
                norm = narrow.tensors[last] = width_norms.mended_final_norm(job, narrow.activations)
                narrow.repaired |= {last} if job.method.repair else set()
            if (lost := width_plain.record(job, narrow.activations, norm)) is not None:
                attachments[CUT_NAME] = lost.to_bytes().decode()
        if job.cut.narrows:
            narrow.layers += width_channels.report(job, block, _no_linears(job, block))
        fate: Fate = {name: ("repaired" if name in narrow.repaired else "pruned", [name]) for name in narrow.tensors}
        rest = [name for name in names if name not in fate]
        tensors, fate = output.keep(job, rest, narrow.tensors, fate)
        return Written(tensors, fate, narrow.layers, narrow.fallbacks, narrow.activations, attachments)

    def config(self, job: WidthJob) -> dict[str, Any]:
        return config_of(job)

    def check(self, job: WidthJob, directory: Path, leaving: Activations | None) -> None:
        """Refuses a directory that transformers does not load as the model that was cut. Raises WorkError."""
        assert leaving is not None
        if job.cut.narrows:
            name, _ = width_norms.final_norm(job)
            width_norms.put_final_norm(job, Checkpoint.open(directory).read(name))
        super().check(job, directory, leaving)


def _no_linears(job: WidthJob, block: int) -> list[str]:
    """The tensors that lose channels, linears of blocks apart: of this block, and with the first those around it."""
    skeleton = job.skeleton
    names = skeleton.block_tensors(block) + (skeleton.outer_tensors() if block == 0 else [])
    linears = {name for spec in skeleton.linears(block) for name in (spec.weight, f"{spec.name}.bias")}
    left = linears | skeleton.stored_copies()
    index = job.checkpoint.index
    return [
        n
        for n in names
        if n not in left and job.cut.shape(job.layout, n, tuple(index[n].shape)) != tuple(index[n].shape)
    ]

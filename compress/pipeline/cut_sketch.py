"""A model of the shape that a cut will have, without making the cut: for measuring its speed beforehand.

Its weights are the first rows and columns of the source's, and the first blocks: no speed depends on their values.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from compress.errors import UserError, WorkError
from compress.pipeline import depth_job, width_job
from compress.pipeline.cut_job import CutJob
from compress.pipeline.depth_job import DROPPED, DepthJob
from compress.pipeline.source import read_finite
from compress.pipeline.width_job import WidthJob


def write_sketch(job: CutJob, directory: Path) -> None:
    """Writes the sketch into an empty directory, a file for each block, so that one block is in memory at a time.

    Raises UserError for a cut of another kind than in width or depth, WorkError where the disk is full.
    """
    if isinstance(job, DepthJob):
        job = replace(job, decided={DROPPED: list(job.cut.candidates[: job.cut.drop])})
        config = depth_job.config_of(job)
    elif isinstance(job, WidthJob):
        config = width_job.config_of(job)
    else:
        raise UserError(f"no speed can be aimed at with {job.method_name}", "use width or depth, or --target-params")
    files: dict[str, str] = {}
    try:
        for number, part in enumerate(_parts(job)):
            name = f"part-{number:05d}.safetensors"
            save_file(part, directory / name, {"format": "pt"})
            files |= dict.fromkeys(part, name)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
        (directory / "config.json").write_text(json.dumps(config))
        for file in job.checkpoint.aux_files():
            if not (directory / file.name).exists():
                shutil.copyfile(file, directory / file.name)
    except OSError as error:
        raise WorkError(
            f"a model of the shape to be timed cannot be written: {error}", "set TMPDIR to a disk with room for it"
        ) from error


def _parts(job: DepthJob | WidthJob) -> Iterator[dict[str, Tensor]]:
    """Tensors by name: those around the blocks, then each block's."""
    skeleton = job.skeleton
    copies = skeleton.stored_copies()
    yield {name: _cut(job, name) for name in skeleton.outer_tensors() if name not in copies}
    kept = job.kept if isinstance(job, DepthJob) else list(range(skeleton.num_blocks))
    for new, block in enumerate(kept):
        old, now = skeleton.block_prefix(block), skeleton.block_prefix(new)
        yield {now + name.removeprefix(old): _cut(job, name) for name in skeleton.block_tensors(block)}


def _cut(job: DepthJob | WidthJob, name: str) -> Tensor:
    tensor = read_finite(job.checkpoint, name)
    if isinstance(job, WidthJob):
        for axis, size in enumerate(job.cut.shape(job.layout, name, tuple(tensor.shape))):
            tensor = tensor.narrow(axis, 0, size)
    return tensor.contiguous().clone()

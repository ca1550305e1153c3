"""The outline of what a stage will make: its config and the shapes of its tensors, without their values.

A plan of the stages behind it reads no more than that. It is a model directory whose weight file is one hole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compress.artifact.tensorfile import encode_header
from compress.formats.safetensors_header import TORCH_NAMES
from compress.models.checkpoint import Checkpoint
from compress.pipeline import depth_job, width_job
from compress.pipeline.depth_job import DepthJob
from compress.pipeline.distill_job import DistillJob
from compress.pipeline.plan import AnyPlan
from compress.pipeline.prune_job import PruneJob
from compress.pipeline.width_job import WidthJob
from compress.pipeline.width_plan import WidthPlan
from compress.pipeline.work import Work

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]

_NAMES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}


def outline(job: Work, plan: AnyPlan, directory: Path) -> bool:
    """Writes the outline of a work's result into a new directory; False where it cannot be told beforehand.

    It is told of what keeps all shapes, and of cuts in width and in depth; only if it is as large as was planned.
    """
    shapes = _shapes(job, plan)
    if shapes is None:
        return False
    count = {name: dtype.itemsize * torch.Size(shape).numel() for name, (dtype, shape) in shapes.items()}
    if sum(count.values()) != plan.output_bytes:
        return False
    config = _config(job)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in job.checkpoint.aux_files():
        shutil.copyfile(file, directory / file.name)
    names = {name: _NAMES[str(dtype).removeprefix("torch.")] for name, (dtype, _) in shapes.items()}
    header = encode_header((name, names[name], shapes[name][1], count[name]) for name in shapes)
    with (directory / "model.safetensors").open("wb") as weights:
        weights.write(header)
        weights.truncate(len(header) + plan.output_bytes)
    return True


def _config(job: Work) -> Mapping[str, Any]:
    if isinstance(job, WidthJob):
        return width_job.config_of(job)
    if isinstance(job, DepthJob):
        return depth_job.config_of(_chosen(job))
    return job.checkpoint.config


def _shapes(job: Work, plan: AnyPlan) -> Shapes | None:
    stored = _stored(job.checkpoint, job.skeleton.stored_copies())
    if isinstance(job, DistillJob):
        return stored
    if isinstance(job, PruneJob):
        return stored if job.stage.format == "dense" else None
    if isinstance(job, WidthJob) and isinstance(plan, WidthPlan):
        return _narrow(job, stored, plan)
    if isinstance(job, DepthJob):
        return _shallow(_chosen(job), stored)
    return None


def _stored(checkpoint: Checkpoint, copies: set[str]) -> Shapes:
    return {name: (info.dtype, tuple(info.shape)) for name, info in checkpoint.index.items() if name not in copies}


def _narrow(job: WidthJob, shapes: Shapes, plan: WidthPlan) -> Shapes:
    weights = {spec.name: spec.weight for spec in job.skeleton.linears()}
    for linear in plan.linears:
        dtype, _ = shapes[weights[linear.name]]
        shapes[weights[linear.name]] = (dtype, (linear.kept_out, linear.kept_in))
        if (bias := f"{linear.name}.bias") in shapes:
            shapes[bias] = (shapes[bias][0], (linear.kept_out,))
    return shapes


def _chosen(job: DepthJob) -> DepthJob:
    """The job as if the first blocks went that may: they are equally large, and which go the run decides."""
    return replace(job, decided={depth_job.DROPPED: list(job.cut.candidates[: job.cut.drop])})


def _shallow(job: DepthJob, shapes: Shapes) -> Shapes:
    prefix = job.skeleton.block_prefix
    renamed: Shapes = dict(shapes)
    for block in range(job.cut.blocks):
        for name in job.skeleton.block_tensors(block):
            renamed.pop(name, None)
    for new, block in enumerate(job.kept):
        for name in job.skeleton.block_tensors(block):
            renamed[prefix(new) + name.removeprefix(prefix(block))] = shapes[name]
    return renamed

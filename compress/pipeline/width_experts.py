"""Which neurons of each expert of a mixture stay, by what the router of the original model sends it.

Tokens of an expert differ between the original model and the one that is cut, so the two are not met side by side as
other linears are: the original block is run on its own, and pauses at every expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing

import torch
from torch import Tensor

from compress.artifact.manifest import Fallback
from compress.calibration.staged import StagedForward
from compress.calibration.statistics import collect
from compress.models.skeleton import LinearSpec
from compress.pipeline.block import Workers, stages
from compress.pipeline.inputs import Activations
from compress.pipeline.linears import UNSEEN
from compress.pipeline.routing import Routing
from compress.pipeline.source import read_weight
from compress.pipeline.twin import Pair
from compress.pipeline.width_job import KEPT, WidthJob
from compress.pipeline.width_repair import chosen


def of_block(job: WidthJob, block: int, entering: Activations, workers: Workers) -> dict[str, Tensor]:
    """The inputs that stay, (kept,) int64 sorted, of every expert's linear that loses some and that a token reaches.

    Starved experts choose by all tokens, as they learn. Empty where the whole model was measured instead.
    """
    specs = [spec for spec in job.skeleton.linears(block) if spec.expert is not None and job.consumes(spec)]
    if not specs or job.moments is not None:
        return {}
    by_name = {spec.name: spec for spec in specs}
    module = job.skeleton.materialise(block)
    live, routing = job.skeleton.modules(block, module), Routing.of(job.stage.calibration, module)
    watched = {**routing.watched, **{name: live[name] for name in by_name}}
    forward = StagedForward(entering.original_runs(job.skeleton, module), watched, workers.count)
    found = {}
    with closing(stages(forward, routing)) as reached:
        for stage in reached:
            spec = by_name[stage.name]
            weight = read_weight(job.checkpoint, spec)[job.written(spec)]
            found[spec.name] = chosen(job, spec, weight, collect(stage.inputs, {}, workers.pool))
    return found


def unseen(spec: LinearSpec, known: Mapping[str, Tensor] | None, pair: Pair | None) -> bool:
    """Whether nothing is known of what an expert's linear reads: in the whole model, or where that is not asked."""
    return spec.expert is not None and (pair is None if known is None else f"of.{spec.name}" not in known)


def by_weights(job: WidthJob, spec: LinearSpec) -> Tensor:
    """The inputs that stay of an expert's linear that no token reached: those with the largest columns."""
    if not job.consumes(spec):
        assert job.channels is not None
        return job.channels
    _, keep, _ = job.groups(spec)
    energy = read_weight(job.checkpoint, spec).square().sum(0)
    return torch.argsort(energy, descending=True, stable=True)[:keep].sort().values


def fallback(job: WidthJob, spec: LinearSpec, known: Mapping[str, Tensor] | None, pair: Pair | None) -> Fallback | None:
    """What is not done as asked for an expert's linear that too few tokens reach."""
    if unseen(spec, known, pair):
        return Fallback(name=spec.name, action="largest columns, no repair", reason=UNSEEN)
    silent = job.method.first_order and spec.expert is not None and spec.name not in job.decided[KEPT]
    if silent and job.consumes(spec):
        return Fallback(name=spec.name, action="chosen by repair", reason="no token of the gradients reached it")
    return None


def routers(job: WidthJob, block: int) -> list[LinearSpec]:
    """The routers of a block as linears, which they are where they read the stream."""
    index, found = job.checkpoint.index, []
    for name in job.skeleton.router_tensors(block):
        if len(shape := index[name].shape) == 2:
            found.append(LinearSpec(name.removesuffix(".weight"), block, shape[1], shape[0], "linear", None, name))
    return found

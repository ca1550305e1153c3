"""Which channels of the stream stay, and the tensors around the linears that lose channels: norms, embedding, head.

Every norm is a place where the stream is read. A channel's removal costs, at each, what the linears behind the norm
lose after the channels that stay have made up for it (`width.costs`), as a share of what they put out; the sum over
all norms decides. The final norm and the head count as one more place.

The live model keeps its width, with zeros where channels went. A norm then takes its mean square over more channels
than the narrow one will, so the narrow norm's gain is the larger by the root of the ratio.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, cast

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from compress.artifact.layers import LayerRecord
from compress.calibration.staged import StagedForward
from compress.calibration.statistics import collect
from compress.errors import WorkError
from compress.pipeline import inputs, stats_cache
from compress.pipeline.block import Workers, stages
from compress.pipeline.inputs import Activations
from compress.pipeline.source import read_finite
from compress.pipeline.width_job import CHANNELS, WidthJob
from compress.pipeline.width_shape import AXES, module_of
from compress.progress import Progress
from compress.pruning import width
from compress.quantization.hessian import cholesky, damped

PARTS = ("readers", "moments")
HEAD_WINDOWS = 8
SLICE_ROWS = 4096
_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def decide(job: WidthJob, workers: Workers, progress: Progress) -> dict[str, Any] | None:
    """The channels that stay, from one pass of the original model; None where all do.

    Raises WorkError where activations are not finite.
    """
    if not job.cut.narrows:
        return None
    assert job.calibration is not None
    progress.begin("choosing channels of the stream", job.skeleton.num_blocks + 1)

    def measure() -> dict[str, Tensor]:
        parts = enumerate(_places(job, workers, progress))
        return {f"{part}.{place}": each for place, pair in parts for part, each in zip(PARTS, pair, strict=True)}

    facts = {"damp_frac": job.method.damp_frac}
    found = stats_cache.measured(job, "channels", facts, measure, progress)
    count = len(found) // len(PARTS)
    places = [(found[f"{PARTS[0]}.{place}"], found[f"{PARTS[1]}.{place}"]) for place in range(count)]
    kept = width.common_survivors(places, job.cut.hidden)
    progress.end()
    return {CHANNELS: kept.tolist()}


def _places(job: WidthJob, workers: Workers, progress: Progress) -> Iterator[tuple[Tensor, Tensor]]:
    """Of every norm: the square root R^T R = W^T W of all that reads it (hidden, hidden), and its second moments."""
    skeleton = job.skeleton
    assert job.calibration is not None
    entering = inputs.enter(skeleton, job.calibration.tokens, False)
    for block in range(skeleton.num_blocks):
        module = skeleton.materialise(block)
        live = skeleton.modules(block, module)
        readers = {name: m for name, m in live.items() if name.endswith((_ATTENTION[0], _MLP[0]))}
        forward = StagedForward(entering.runs(skeleton, module), readers, workers.count)
        with closing(stages(forward)) as reached:
            for stage in reached:
                names = _ATTENTION if stage.name.endswith(_ATTENTION[0]) else _MLP
                stem = stage.name.rpartition(".")[0]
                weights = [cast(Tensor, live[f"{stem}.{name}"].weight).float() for name in names]
                gram = torch.stack([weight.T @ weight for weight in weights]).sum(0)
                yield _place(job, gram, collect(stage.inputs, {}, workers.pool).hessian)
        entering = entering.advanced(forward.outputs)
        progress.advance(f"block {block}: measured")
    read = [skeleton.before_head(chunk).flatten(0, 1) for chunk in entering.quantized]
    yield _place(job, head_gram(job, entering.quantized), collect(read, {}, workers.pool).hessian)
    progress.advance("head")


def head_gram(job: WidthJob, leaving: Sequence[Tensor]) -> Tensor:
    """E^T (diag p - p p^T) E (hidden, hidden) of the head E: what an error of its input costs in KL, to second order.

    p: the mean of the distributions that the original model has behind `leaving`, hidden states (samples, seq, hidden)
    of the last block.
    """
    skeleton = job.skeleton
    windows = [window for chunk in leaving for window in chunk.split(1)][:HEAD_WINDOWS]
    p = torch.stack([skeleton.head(window).softmax(-1).flatten(0, 1).mean(0) for window in windows]).mean(0)
    name = skeleton.tied().get(skeleton.head_weight, skeleton.head_weight)
    hidden = job.cut.all_hidden
    gram, mean = torch.zeros(hidden, hidden), torch.zeros(hidden)
    for start in range(0, len(p), SLICE_ROWS):
        rows = job.checkpoint.read_rows(name, slice(start, start + SLICE_ROWS)).float()
        weighted = rows * p[start : start + SLICE_ROWS, None]
        gram += rows.T @ weighted
        mean += weighted.sum(0)
    return gram - torch.outer(mean, mean)


def _place(job: WidthJob, gram: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    factored, shape = cholesky(moments, job.method.damp_frac), cholesky(gram, 1e-6)
    if factored is None or shape is None:
        raise WorkError(
            "no damping makes the second moments of what the linears read from the stream positive definite",
            "calibrate on more text, or check the source model with `compress eval`",
        )
    return shape.lower.T.contiguous(), damped(moments, factored.damp_frac)


def masked(job: WidthJob, entering: Activations) -> Activations:
    """What enters the first block, with zeros in the channels that go."""
    channels = job.channels
    if channels is None:
        return entering
    stays = torch.zeros(job.cut.all_hidden)
    stays[channels] = 1.0
    return entering.standing_at(entering.block, [chunk * stays.to(chunk.dtype) for chunk in entering.quantized])


def narrow_norms(job: WidthJob, names: Sequence[str], live: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The narrow weights of the norms among the checkpoint's tensors `names`; gives the live ones what those say.

    live: modules by checkpoint name.
    """
    tensors = {}
    for name in names:
        if AXES.get(module_of(name)) == ("hidden",):
            stored = read_finite(job.checkpoint, name)
            tensors[name] = _narrow(job, stored.float()).to(stored.dtype)
            put_norm(job, live[name.removesuffix(".weight")], tensors[name])
    return tensors


def _narrow(job: WidthJob, gain: Tensor) -> Tensor:
    """The gain (hidden,) float32 that the narrow norm needs for what (all_hidden,) is in the live one."""
    assert job.channels is not None
    return gain[job.channels] * (job.cut.all_hidden / job.cut.hidden) ** 0.5


def put_norm(job: WidthJob, module: nn.Module, narrow: Tensor) -> None:
    """Gives a live norm what the narrow one's weight (hidden,) says."""
    assert job.channels is not None
    parameter = cast(nn.Parameter, module.weight)
    whole = torch.zeros(job.cut.all_hidden)
    whole[job.channels] = narrow.float() * (job.cut.hidden / job.cut.all_hidden) ** 0.5
    parameter.data = whole.to(parameter.dtype)


def final_norm(job: WidthJob) -> tuple[str, nn.Module]:
    """The norm behind the last block: its weight's name and the live module."""
    found = {
        name: m for name, m in job.skeleton.outer_modules().items() if AXES.get(name.split(".")[-1]) == ("hidden",)
    }
    ((name, module),) = found.items()
    return f"{name}.weight", module


def mended_final_norm(job: WidthJob, leaving: Activations) -> Tensor:
    """The narrow gain of the final norm. Repaired, it is that with which the head's logits are nearest, in the metric
    of `head_gram`, to those of the original model; `leaving` must hold the original's activations too."""
    channels, (name, module) = job.channels, final_norm(job)
    assert channels is not None
    stored = read_finite(job.checkpoint, name)
    if not job.method.repair:
        return _narrow(job, stored.float()).to(stored.dtype)
    gram = head_gram(job, list(leaving.original.values()))
    moments, cross = torch.zeros(2, job.cut.all_hidden, job.cut.all_hidden)
    parameter = cast(nn.Parameter, module.weight)
    before = parameter.data
    for place, original in leaving.original.items():
        wanted = job.skeleton.before_head(original).flatten(0, 1).float()
        parameter.data = torch.ones_like(before)
        found = job.skeleton.before_head(leaving.quantized[place]).flatten(0, 1).float()
        parameter.data = before
        moments += found.T @ found
        cross += found.T @ wanted
    system = gram[channels][:, channels] * moments[channels][:, channels]
    system.diagonal().add_(job.method.damp_frac * system.diagonal().mean())
    gain = torch.zeros(job.cut.all_hidden)
    gain[channels] = torch.linalg.solve(system, (gram[channels] * cross[channels]).sum(1))
    return _narrow(job, gain).to(stored.dtype)


def report(job: WidthJob, block: int, names: Iterable[str]) -> list[LayerRecord]:
    """What loses channels and is no linear of a block, with how many parameters go; counted to `block`."""
    rows = []
    for name in names:
        shape = tuple(job.checkpoint.index[name].shape)
        now = job.cut.shape(name, shape)
        details: dict[str, JsonValue] = {"shape": list(now), "source_shape": list(shape)}
        details["removed"] = math.prod(shape) - math.prod(now)
        plain = name.removesuffix(".weight")
        rows.append(LayerRecord(name=plain, block=block, method=job.method_name, scheme=job.label, details=details))
    return rows

"""Which channels of the stream stay, and what is reported of tensors around the linears that lose channels.

Every norm is a place where the stream is read. A channel's removal costs, at each, what the linears behind the norm
lose after the channels that stay have made up for it (`width.costs`), as a share of what they put out; the sum over
all norms decides. The final norm and the head count as one more place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, cast

import torch
from pydantic import JsonValue
from torch import Tensor

from compress.artifact.layers import LayerRecord
from compress.calibration.staged import StagedForward
from compress.calibration.statistics import collect
from compress.errors import WorkError
from compress.pipeline import inputs, stats_cache
from compress.pipeline.block import Workers, stages
from compress.pipeline.inputs import Activations
from compress.pipeline.routing import experts_per_token
from compress.pipeline.width_job import CHANNELS, WidthJob
from compress.pipeline.width_layout import NORM
from compress.progress import Progress
from compress.pruning import width
from compress.quantization.hessian import cholesky, damped

WHAT = "channels"
PARTS = ("readers", "moments")
HEAD_WINDOWS = 8
SLICE_ROWS = 4096


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

    found = stats_cache.measured(job, WHAT, _facts(job), measure, progress)
    count = len(found) // len(PARTS)
    places = [(found[f"{PARTS[0]}.{place}"], found[f"{PARTS[1]}.{place}"]) for place in range(count)]
    kept = width.common_survivors(places, job.cut.hidden)
    progress.end()
    return {CHANNELS: kept.tolist()}


def there(job: WidthJob) -> bool:
    """Whether a run would find what it chooses by."""
    return stats_cache.there(job, WHAT, _facts(job))


def _facts(job: WidthJob) -> dict[str, Any]:
    return {"damp_frac": job.method.damp_frac}


def _places(job: WidthJob, workers: Workers, progress: Progress) -> Iterator[tuple[Tensor, Tensor]]:
    """Of every norm: the square root R^T R = W^T W of all that reads it (hidden, hidden), and its second moments."""
    skeleton = job.skeleton
    assert job.calibration is not None
    entering = inputs.enter(skeleton, job.calibration.tokens, False)
    for block in range(skeleton.num_blocks):
        module = skeleton.materialise(block)
        live = skeleton.modules(block, module)
        readers, passed = _readers(job, block), _passed(job, block)
        watched = {names[0]: live[names[0]] for names in readers}
        forward = StagedForward(entering.runs(skeleton, module), watched, workers.count)
        with closing(stages(forward)) as reached:
            for stage in reached:
                (names,) = (each for each in readers if each[0] == stage.name)
                gram = torch.zeros(job.cut.all_hidden, job.cut.all_hidden)
                for name in names:
                    weight = cast(Tensor, live[name].weight).float()
                    gram.add_(weight.T @ weight, alpha=passed.get(name, 1.0))
                yield _place(job, gram, collect(stage.inputs, {}, workers.pool).hessian)
        entering = entering.advanced(forward.outputs)
        progress.advance(f"block {block}: measured")
    read = [skeleton.before_head(chunk).flatten(0, 1) for chunk in entering.quantized]
    yield _place(job, head_gram(job, entering.quantized), collect(read, {}, workers.pool).hessian)
    progress.advance("head")


def _readers(job: WidthJob, block: int) -> list[Sequence[str]]:
    """What reads the stream in a block, that behind one norm together, by name: linears and routers."""
    norms = [edge for edge in job.skeleton.edges(block) if job.layout.axes_of(f"{edge.producer}.weight") == NORM]
    return [edge.consumers for edge in norms]


def _passed(job: WidthJob, block: int) -> dict[str, float]:
    """The share of the tokens that goes through an expert on average, by the name of its linears."""
    among = experts_per_token(job)
    specs = job.skeleton.linears(block)
    return {} if among is None else {spec.name: among[0] / among[1] for spec in specs if spec.expert is not None}


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
    plain = None if entering.plain is None else entering.plain * stays.to(entering.plain.dtype)
    left = [chunk * stays.to(chunk.dtype) for chunk in entering.quantized]
    return replace(entering.standing_at(entering.block, left), plain=plain)


def report(job: WidthJob, block: int, names: Iterable[str]) -> list[LayerRecord]:
    """What loses channels and is no linear of a block, with how many parameters go; counted to `block`."""
    rows = []
    for name in names:
        shape = tuple(job.checkpoint.index[name].shape)
        now = job.cut.shape(job.layout, name, shape)
        details: dict[str, JsonValue] = {"shape": list(now), "source_shape": list(shape)}
        details["removed"] = math.prod(shape) - math.prod(now)
        plain = name.removesuffix(".weight")
        rows.append(LayerRecord(name=plain, block=block, method=job.method_name, scheme=job.label, details=details))
    return rows

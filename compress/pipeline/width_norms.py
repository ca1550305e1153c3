"""The norms of a narrower stream, and the tables around it: embedding and head.

The live model keeps its width, with zeros where channels went. A norm then takes its mean square over more channels
than the narrow one will, so the narrow norm's gain is the larger by the root of the ratio.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from compress.pipeline import width_channels
from compress.pipeline.inputs import Activations
from compress.pipeline.source import read_finite
from compress.pipeline.width_job import WidthJob
from compress.pipeline.width_layout import NORM


def narrow_norms(job: WidthJob, names: Sequence[str], live: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The narrow weights of the norms among the checkpoint's tensors `names`; gives the live ones what those say.

    live: modules by checkpoint name.
    """
    tensors = {}
    for name in names:
        if job.layout.axes_of(name) == NORM:
            stored = read_finite(job.checkpoint, name)
            tensors[name] = _narrow(job, stored.float() + _offset(job), _wider(job)).to(stored.dtype)
            put_norm(job, live[name.removesuffix(".weight")], tensors[name], _wider(job))
    return tensors


def _wider(job: WidthJob) -> float:
    """How much larger the gain of a narrow norm is: the root of the ratio of the widths."""
    return float((job.cut.all_hidden / job.cut.hidden) ** 0.5)


def _of_final(job: WidthJob) -> float:
    """The same of the final norm, whose head may be the embedding, which is the larger itself where it is scaled."""
    return 1.0 if _head_grows(job) else _wider(job)


def _head_grows(job: WidthJob) -> bool:
    head = job.skeleton.head_weight
    return job.layout.scaled and job.skeleton.tied().get(head, head) == job.skeleton.embedding


def _offset(job: WidthJob) -> float:
    """What a norm adds to its weight to have its gain."""
    return float(job.skeleton.family.offset_norms)


def _narrow(job: WidthJob, gain: Tensor, factor: float) -> Tensor:
    """The weight of the narrow norm for a gain (all_hidden,) float32 of the live one."""
    assert job.channels is not None
    return gain[job.channels] * factor - _offset(job)


def put_norm(job: WidthJob, module: nn.Module, narrow: Tensor, factor: float) -> None:
    """Gives a live norm what the narrow one's weight (hidden,) says."""
    assert job.channels is not None
    parameter = cast(nn.Parameter, module.weight)
    whole = torch.zeros(job.cut.all_hidden)
    whole[job.channels] = (narrow.float() + _offset(job)) / factor
    parameter.data = (whole - _offset(job)).to(parameter.dtype)


def narrow_table(job: WidthJob, name: str, table: Tensor) -> Tensor:
    """The columns of the embedding or the head that stay. What multiplies an embedding by the root of its width does
    so by less then, and the table makes up for it."""
    assert job.channels is not None
    kept = table[:, job.channels]
    if not job.layout.scaled or name != job.skeleton.embedding:
        return kept.contiguous()
    return (kept.float() * _wider(job)).to(table.dtype)


def mended_norm(job: WidthJob, name: str, module: nn.Module, found: Tensor, wanted: Tensor) -> Tensor:
    """The narrow weight of a norm that writes to the stream, by least squares channel by channel; the live one gets it.

    found, wanted: (tokens, all_hidden) float32, what enters the norm now and in the original model for the same tokens.
    """
    stored = read_finite(job.checkpoint, name)
    parameter = cast(nn.Parameter, module.weight)
    dtype = parameter.dtype
    parameter.data = stored.to(dtype)
    goal = module(wanted.to(dtype)).float()
    parameter.data = torch.full_like(parameter.data, 1.0 - _offset(job))
    plain = module(found.to(dtype)).float()
    squares = plain.square().sum(0)
    gain = (plain * goal).sum(0) / (squares + job.method.damp_frac * squares.mean())
    narrow = _narrow(job, gain, _wider(job)).to(stored.dtype)
    put_norm(job, module, narrow, _wider(job))
    return narrow


def final_norm(job: WidthJob) -> tuple[str, nn.Module]:
    """The norm behind the last block: its weight's name and the live module."""
    found = {
        name: m for name, m in job.skeleton.outer_modules().items() if job.layout.axes_of(f"{name}.weight") == NORM
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
        return plain_final_norm(job)
    gram = width_channels.head_gram(job, list(leaving.original.values()))
    moments, cross = torch.zeros(2, job.cut.all_hidden, job.cut.all_hidden)
    parameter = cast(nn.Parameter, module.weight)
    before = parameter.data
    for place, original in leaving.original.items():
        wanted = job.skeleton.before_head(original).flatten(0, 1).float()
        parameter.data = torch.full_like(before, 1.0 - _offset(job))
        found = job.skeleton.before_head(leaving.quantized[place]).flatten(0, 1).float()
        parameter.data = before
        moments += found.T @ found
        cross += found.T @ wanted
    system = gram[channels][:, channels] * moments[channels][:, channels]
    system.diagonal().add_(job.method.damp_frac * system.diagonal().mean())
    gain = torch.zeros(job.cut.all_hidden)
    gain[channels] = torch.linalg.solve(system, (gram[channels] * cross[channels]).sum(1))
    return _narrow(job, gain, _of_final(job)).to(stored.dtype)


def plain_final_norm(job: WidthJob) -> Tensor:
    """The narrow weight of the final norm that is not repaired."""
    stored = read_finite(job.checkpoint, final_norm(job)[0])
    return _narrow(job, stored.float() + _offset(job), _of_final(job)).to(stored.dtype)


@contextmanager
def as_final_norm(job: WidthJob, narrow: Tensor | None) -> Iterator[None]:
    """The live final norm has what the narrow one's weight (hidden,) says for as long as this lasts; None: its own."""
    if narrow is None:
        yield
        return
    _, module = final_norm(job)
    parameter = cast(nn.Parameter, module.weight)
    before = parameter.data
    try:
        put_final_norm(job, narrow)
        yield
    finally:
        parameter.data = before


def put_final_norm(job: WidthJob, narrow: Tensor) -> None:
    """Gives the live final norm what the narrow one's weight (hidden,) says."""
    put_norm(job, final_norm(job)[1], narrow, _of_final(job))

"""A width cut made concrete: how many neurons, query heads and channels of the stream stay, in all blocks alike."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.models.skeleton import Skeleton
from compress.pipeline.cut_job import CutJob
from compress.pipeline.inputs import first_chunk
from compress.pipeline.mask_moments import Original
from compress.pipeline.width_layout import LAYOUTS, Layout
from compress.pipeline.width_shape import WidthCut, count
from compress.pipeline.work import Problem
from compress.pruning.configs import WidthConfig
from compress.stages import PruneStage

NEURONS_KEPT, HEADS_KEPT = "neurons", "heads"
"""Of `decided`: the neurons and query heads that stay, by the number of the block as text, where gradients say so."""
CHANNELS = "channels"
"""Of `decided`: the channels of the stream that stay, sorted."""


@dataclass(frozen=True, kw_only=True)
class WidthJob(CutJob):
    """Everything a plan or a run of a width cut needs."""

    cut: WidthCut

    @property
    def method(self) -> WidthConfig:
        assert isinstance(self.stage.method, WidthConfig)
        return self.stage.method

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.skeleton.family.model_type]

    @property
    def channels(self) -> Tensor | None:
        """The channels of the stream that stay, (hidden,) int64 sorted, once that is decided; None where all do."""
        return torch.tensor(self.decided[CHANNELS]) if self.cut.narrows else None

    @property
    def needs_original(self) -> bool:
        return True

    @property
    def follows_plain(self) -> bool:
        return self.method.repair

    @property
    def walked(self) -> Tensor | None:
        """The first chunk, by which what the cut lost is measured, where all else is known from the whole model."""
        tokens = super().walked
        return first_chunk(tokens) if tokens is not None and self.moments is not None else tokens

    @cached_property
    def moments(self) -> Original | None:
        """What linears read in the model before it is cut, where that alone decides; None where blocks are compared."""
        return Original(self) if self.method.measured == "model" else None


def assign(stage: PruneStage, skeleton: Skeleton) -> tuple[WidthCut, list[Problem]]:
    """The cut nearest below what the stage asks for, and what forbids it.

    Raises UserError for a family whose width cannot be cut.
    """
    method, family = stage.method, skeleton.family.model_type
    assert isinstance(method, WidthConfig)
    assert stage.keep is not None
    layout = _layout(family, method)
    whole = _whole(skeleton, layout)
    wanted = replace(whole, hidden=_multiple(whole.all_hidden, method.hidden, method.multiple))
    if whole.all_heads > 1:
        wanted = replace(wanted, heads=math.ceil(whole.all_heads * method.heads))
    else:
        wanted = replace(wanted, kv_heads=math.ceil(whole.all_kv_heads * method.heads))
    fixed = count(skeleton, replace(wanted, neurons=0))
    per_neuron = count(skeleton, replace(wanted, neurons=1)) - fixed
    room = math.floor(stage.keep * whole.all_parameters) - fixed
    neurons = min(whole.all_neurons, room // per_neuron // method.multiple * method.multiple)
    problems = []
    if wanted.narrows and (strange := _strange(skeleton, layout)) is not None:
        problems.append(Problem(f"{strange} has axes that are not known", "leave `hidden` out"))
    if neurons < method.multiple:
        smallest = (fixed + method.multiple * per_neuron) / whole.all_parameters
        message = f"keep {stage.keep:g} would leave no neuron: embeddings and attention alone are more"
        problems.append(Problem(message, f"with these settings the smallest keep is {smallest:.3f}"))
        neurons = method.multiple
    return replace(wanted, neurons=neurons, parameters=fixed + neurons * per_neuron), problems


def _layout(family: str, method: WidthConfig) -> Layout:
    layout = LAYOUTS.get(family)
    if layout is None:
        raise UserError(
            f"the width of {family} models cannot be cut: their neurons are those of experts",
            "use --method experts, which takes whole ones, or --method depth",
        )
    if method.heads < 1 and layout.heads_stay is not None:
        raise UserError(f"query heads of {family} models cannot go: {layout.heads_stay}", "leave `heads` out")
    if method.hidden < 1 and layout.stream_stays is not None:
        raise UserError(
            f"the stream of {family} models cannot lose channels: {layout.stream_stays}", "leave `hidden` out"
        )
    return layout


def _whole(skeleton: Skeleton, layout: Layout) -> WidthCut:
    """The model as it is."""
    config, specs, total = skeleton.config, skeleton.linears(0), skeleton.parameters()
    fed_by_heads = next(spec for spec in specs if spec.name.endswith(layout.out))
    neurons = next(spec for spec in specs if spec.name.endswith(layout.down)).in_features
    queries = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or queries)
    heads, head_dim, hidden = queries // kv_heads, fed_by_heads.in_features // queries, fed_by_heads.out_features
    return WidthCut(neurons, neurons, heads, heads, kv_heads, kv_heads, head_dim, hidden, hidden, total, total)


def _multiple(size: int, share: float, multiple: int) -> int:
    """The multiple nearest to a share of `size` at or below, and at least one; all of it for the share 1."""
    return size if share == 1 else min(size, max(1, math.floor(round(size * share / multiple, 9))) * multiple)


def _strange(skeleton: Skeleton, layout: Layout) -> str | None:
    """A tensor of which it is not known what its axes are."""
    return next((name for name in skeleton.checkpoint.source_index if layout.axes_of(name) is None), None)


def config_of(job: WidthJob) -> dict[str, Any]:
    """config.json of the result: the source's with the new widths."""
    cut, config, layout = job.cut, {**job.checkpoint.config, job.layout.size: job.cut.neurons}, job.layout
    if layout.heads_stay is None:
        config |= {"num_attention_heads": cut.heads * cut.kv_heads}
        config |= {"num_key_value_heads": cut.kv_heads, "head_dim": cut.head_dim}
    if not cut.narrows:
        return config
    # The mean square is taken over fewer channels now; what is added to it grows as much, so norms differ by a factor.
    eps = float(job.skeleton.config.rms_norm_eps) * cut.all_hidden / cut.hidden
    return {**config, "hidden_size": cut.hidden, "rms_norm_eps": eps}

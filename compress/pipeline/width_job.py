"""A width cut made concrete: how many neurons, query heads and channels of the stream stay, in all blocks alike."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.models.skeleton import LinearSpec, Skeleton
from compress.pipeline.cut_job import CutJob
from compress.pipeline.inputs import first_chunk
from compress.pipeline.mask_moments import Original
from compress.pipeline.width_layout import LAYOUTS, OF_HEADS, OF_NEURONS, Axis, Layout
from compress.pipeline.width_shape import WidthCut, count
from compress.pipeline.work import Problem
from compress.pruning.configs import WidthConfig
from compress.stages import PruneStage

KEPT = "kept"
"""Of `decided`: the neurons or query heads that stay, by the linear that they feed, where gradients say so."""
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

    def consumes(self, spec: LinearSpec) -> bool:
        """Whether neurons or heads feed this linear."""
        return spec.name.endswith((self.layout.out, self.layout.down))

    def reads(self, spec: LinearSpec) -> bool:
        """Whether this linear's inputs are channels of the stream."""
        return (self.layout.axes_of(spec.weight) or (None, None))[1] == "hidden"

    def groups(self, spec: LinearSpec) -> tuple[int, int, int]:
        """Of the inputs of a linear that neurons or heads feed: how many equal runs there are, how many units of each
        stay, and of how many inputs a unit is."""
        if not spec.name.endswith(self.layout.down):
            return *self.cut.sections, self.cut.head_dim
        axis = (self.layout.axes_of(spec.weight) or (None, None))[1]
        assert axis is not None
        return 1, self.cut.size(axis), 1

    def written(self, spec: LinearSpec) -> Tensor:
        """The outputs of a linear that stay, as far as they are channels of the stream: (rows,) int64 sorted."""
        if self.channels is not None and self.consumes(spec):
            return self.channels
        return torch.arange(spec.out_features)

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

    Raises UserError for what a family cannot lose.
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
    fixed = count(skeleton, replace(wanted, neurons=0, dense=0))
    per_neuron = count(skeleton, replace(wanted, neurons=1, dense=0)) - fixed
    per_dense = count(skeleton, replace(wanted, neurons=0, dense=1)) - fixed

    def left(neurons: int, dense: int = 0) -> WidthCut:
        """With so many neurons, and of dense blocks the same share, or `dense` where that is more."""
        dense = max(dense, _multiple(whole.all_dense, neurons / whole.all_neurons, method.multiple))
        parameters = fixed + neurons * per_neuron + dense * per_dense
        return replace(wanted, neurons=neurons, dense=dense, parameters=parameters)

    problems = []
    if wanted.narrows and (strange := _strange(skeleton, layout)) is not None:
        problems.append(Problem(f"{strange} has axes that are not known", "leave `hidden` out"))
    if (beside := _beside(skeleton, layout)) is not None:
        problems.append(
            Problem(
                f"{beside} is in no decoder block, and would keep the width that the others lose",
                "take layers for predicting several tokens out of the checkpoint (num_nextn_predict_layers: 0)",
            )
        )
    possible = [*range(method.multiple, whole.all_neurons, method.multiple), whole.all_neurons]
    room = math.floor(stage.keep * whole.all_parameters)
    fitting = bisect_right(possible, room, key=lambda neurons: left(neurons).parameters)
    if not fitting:
        smallest = left(possible[0]).parameters / whole.all_parameters
        message = f"keep {stage.keep:g} would leave no neuron: embeddings and attention alone are more"
        problems.append(Problem(message, f"with these settings the smallest keep is {smallest:.3f}"))
    neurons = possible[max(fitting - 1, 0)]
    dense = 0
    if per_dense:
        spare = (room - fixed - neurons * per_neuron) // per_dense
        dense = spare // method.multiple * method.multiple if spare < whole.all_dense else whole.all_dense
    return left(neurons, dense), problems


def _layout(family: str, method: WidthConfig) -> Layout:
    layout = LAYOUTS[family]
    if method.heads < 1 and layout.heads_stay is not None:
        raise UserError(f"query heads of {family} models cannot go: {layout.heads_stay}", "leave `heads` out")
    if method.hidden < 1 and layout.stream_stays is not None:
        raise UserError(
            f"the stream of {family} models cannot lose channels: {layout.stream_stays}", "leave `hidden` out"
        )
    return layout


def _whole(skeleton: Skeleton, layout: Layout) -> WidthCut:
    """The model as it is. Raises UserError for a mixture without experts."""
    config, specs, total = skeleton.config, skeleton.linears(), skeleton.parameters()
    inputs: dict[Axis | None, int] = {}
    rows: dict[Axis | None, int] = {}
    for spec in specs:
        out_axis, in_axis = layout.axes_of(spec.weight) or (None, None)
        inputs.setdefault(in_axis, spec.in_features)
        rows.setdefault(out_axis, spec.out_features)
    if (neurons := inputs.get("neurons")) is None:
        raise UserError("no block of this mixture has experts, whose neurons would go", "use --method depth")
    fed_by_heads = next(spec for spec in specs if spec.name.endswith(layout.out))
    queries = int(config.num_attention_heads)
    kv_heads = queries if layout.latent else int(getattr(config, "num_key_value_heads", None) or queries)
    heads, head_dim, hidden = queries // kv_heads, fed_by_heads.in_features // queries, fed_by_heads.out_features
    return WidthCut(
        neurons, neurons, heads, heads, kv_heads, kv_heads, head_dim, hidden, hidden, total, total,
        dense=inputs.get("dense", 0),
        all_dense=inputs.get("dense", 0),
        shared=inputs.get("shared", 0) // neurons,
        query_dim=rows.get("mla_q", 0) // queries,
        value_dim=rows.get("mla_kv", 0) // queries,
    )  # fmt: skip


def _multiple(size: int, share: float, multiple: int) -> int:
    """The multiple nearest to a share of `size` at or below, and at least one; all of it for the share 1."""
    return size if share == 1 else min(size, max(1, math.floor(round(size * share / multiple, 9))) * multiple)


def _strange(skeleton: Skeleton, layout: Layout) -> str | None:
    """A tensor of which it is not known what its axes are."""
    return next((name for name in skeleton.checkpoint.source_index if layout.axes_of(name) is None), None)


def _beside(skeleton: Skeleton, layout: Layout) -> str | None:
    """A tensor outside the blocks that has neurons or heads, such as a multi-token-prediction layer's."""
    axes = {name: layout.axes_of(name) or () for name in skeleton.outer_tensors()}
    return next((name for name, found in axes.items() if {*found} & {*OF_NEURONS, *OF_HEADS}), None)


def config_of(job: WidthJob) -> dict[str, Any]:
    """config.json of the result: the source's with the new widths."""
    cut, layout = job.cut, job.layout
    config = {**job.checkpoint.config, layout.size: cut.neurons}
    if layout.dense_size is not None and cut.all_dense:
        config |= {layout.dense_size: cut.dense}
    if layout.heads_stay is None:
        config |= {"num_attention_heads": cut.heads * cut.kv_heads, "num_key_value_heads": cut.kv_heads}
        config |= {} if layout.latent else {"head_dim": cut.head_dim}
    if not cut.narrows:
        return config
    # The mean square is taken over fewer channels now; what is added to it grows as much, so norms differ by a factor.
    eps = float(job.skeleton.config.rms_norm_eps) * cut.all_hidden / cut.hidden
    return {**config, "hidden_size": cut.hidden, "rms_norm_eps": eps}

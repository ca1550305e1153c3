"""A width cut made concrete: how many neurons, query heads and channels of the stream stay, in all blocks alike."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.models.skeleton import Skeleton
from compress.pipeline.cut_job import CutJob
from compress.pipeline.width_shape import AXES, WidthCut, count, module_of
from compress.pipeline.work import Problem
from compress.pruning.configs import WidthConfig
from compress.recipe_stages import PruneStage

# Families whose blocks are q, k, v, o and gate, up, down, one linear each, and whose config.json can say the cut.
FAMILIES = ("gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
# Of these, the ones whose stream can lose channels: Gemma scales its embedding by the width of the stream.
WITH_CHANNELS = ("llama", "mistral", "qwen2", "qwen3")
NEURONS_KEPT, HEADS_KEPT = "neurons", "heads"
"""Of `decided`: the neurons and query heads that stay, by the number of the block as text, where gradients say so."""
CHANNELS = "channels"
"""Of `decided`: the channels of the stream that stay, sorted."""
FED_BY_NEURONS, NEURONS = "mlp.down_proj", ("mlp.gate_proj", "mlp.up_proj")
FED_BY_HEADS, HEADS = "self_attn.o_proj", "self_attn.q_proj"


@dataclass(frozen=True, kw_only=True)
class WidthJob(CutJob):
    """Everything a plan or a run of a width cut needs."""

    cut: WidthCut

    @property
    def method(self) -> WidthConfig:
        assert isinstance(self.stage.method, WidthConfig)
        return self.stage.method

    @property
    def channels(self) -> Tensor | None:
        """The channels of the stream that stay, (hidden,) int64 sorted, once that is decided; None where all do."""
        return torch.tensor(self.decided[CHANNELS]) if self.cut.narrows else None

    @property
    def needs_original(self) -> bool:
        return True


def assign(stage: PruneStage, skeleton: Skeleton) -> tuple[WidthCut, list[Problem]]:
    """The cut nearest below what the stage asks for, and what forbids it.

    Raises UserError for a family whose width cannot be cut.
    """
    method, family = stage.method, skeleton.family.model_type
    assert isinstance(method, WidthConfig)
    assert stage.keep is not None
    if family not in FAMILIES:
        raise UserError(
            f"the width of {family} models cannot be cut yet", f"families that can: {', '.join(sorted(FAMILIES))}"
        )
    if method.hidden < 1 and family not in WITH_CHANNELS:
        raise UserError(
            f"the stream of {family} models cannot lose channels yet",
            f"leave `hidden` out; families that can: {', '.join(sorted(WITH_CHANNELS))}",
        )
    whole = _whole(skeleton)
    wanted = replace(
        whole,
        heads=max(1, math.ceil(whole.all_heads * method.heads)),
        hidden=_multiple(whole.all_hidden, method.hidden, method.multiple),
    )
    fixed = count(skeleton, replace(wanted, neurons=0))
    per_neuron = count(skeleton, replace(wanted, neurons=1)) - fixed
    room = math.floor(stage.keep * whole.all_parameters) - fixed
    neurons = min(whole.all_neurons, room // per_neuron // method.multiple * method.multiple)
    problems = []
    if wanted.narrows and (strange := _strange(skeleton)) is not None:
        problems.append(Problem(f"{strange} has axes that are not known", "leave `hidden` out"))
    if neurons < method.multiple:
        smallest = (fixed + method.multiple * per_neuron) / whole.all_parameters
        message = f"keep {stage.keep:g} would leave no neuron: embeddings and attention alone are more"
        problems.append(Problem(message, f"with these settings the smallest keep is {smallest:.3f}"))
        neurons = method.multiple
    return replace(wanted, neurons=neurons, parameters=fixed + neurons * per_neuron), problems


def _whole(skeleton: Skeleton) -> WidthCut:
    """The model as it is."""
    config, specs, total = skeleton.checkpoint.config, skeleton.linears(0), skeleton.parameters()
    query = next(spec for spec in specs if spec.name.endswith(HEADS))
    neurons = next(spec for spec in specs if spec.name.endswith(FED_BY_NEURONS)).in_features
    kv_heads = int(config.get("num_key_value_heads") or config["num_attention_heads"])
    heads = int(config["num_attention_heads"]) // kv_heads
    head_dim, hidden = query.out_features // (kv_heads * heads), query.in_features
    return WidthCut(neurons, neurons, heads, heads, kv_heads, head_dim, hidden, hidden, total, total)


def _multiple(size: int, share: float, multiple: int) -> int:
    """The multiple nearest to a share of `size` at or below, and at least one; all of it for the share 1."""
    return size if share == 1 else min(size, max(1, math.floor(round(size * share / multiple, 9))) * multiple)


def _strange(skeleton: Skeleton) -> str | None:
    """A tensor of which it is not known what its axes are."""
    return next((name for name in skeleton.checkpoint.source_index if module_of(name) not in AXES), None)


def config_of(job: WidthJob) -> dict[str, Any]:
    """config.json of the result: the source's with the new widths."""
    cut, config = job.cut, job.checkpoint.config
    changed = {"intermediate_size": cut.neurons, "num_attention_heads": cut.heads * cut.kv_heads}
    changed |= {"num_key_value_heads": cut.kv_heads, "head_dim": cut.head_dim}
    if not cut.narrows:
        return {**config, **changed}
    # The mean square is taken over fewer channels now; what is added to it grows as much, so norms differ by a factor.
    eps = float(job.skeleton.config.rms_norm_eps) * cut.all_hidden / cut.hidden
    return {**config, **changed, "hidden_size": cut.hidden, "rms_norm_eps": eps}

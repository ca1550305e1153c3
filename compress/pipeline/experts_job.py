"""A cut in experts made concrete: how many of every mixture stay, the same number in all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compress.errors import UserError
from compress.models.families import FAMILIES
from compress.models.skeleton import Skeleton
from compress.pipeline.cut_job import Cut, CutJob
from compress.pipeline.work import Problem
from compress.pruning.configs import ExpertsConfig
from compress.stages import PruneStage

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""What families call the number of experts in config.json."""
EXPERTS = "experts"
"""The name of what is kept of the whole model."""
SALIENCY = "saliency"
"""Of `decided`: what every expert adds, by the number of the block as text, where the whole model was measured."""
SMALLEST_GROUP = 2  # routers that choose groups first rank them by their two best experts


@dataclass(frozen=True, slots=True)
class ExpertsCut(Cut):
    """`kept` of the `experts` of every mixture stay, as many in each of `groups` equal runs of them."""

    kept: int
    experts: int
    groups: int
    parameters: int
    all_parameters: int


@dataclass(frozen=True, kw_only=True)
class ExpertsJob(CutJob):
    """Everything a plan or a run of a cut in experts needs."""

    cut: ExpertsCut

    @property
    def method(self) -> ExpertsConfig:
        assert isinstance(self.stage.method, ExpertsConfig)
        return self.stage.method

    @property
    def walked(self) -> Tensor | None:
        """One window, for the check of what was written, where what experts add is known from the whole model."""
        tokens = super().walked
        return tokens[:1] if tokens is not None and self.method.measured == "model" else tokens


def assign(stage: PruneStage, skeleton: Skeleton) -> tuple[ExpertsCut, list[Problem]]:
    """The cut nearest below what the stage asks for, and what forbids it.

    Raises UserError for a model without experts.
    """
    assert stage.keep is not None
    config, total = skeleton.config, skeleton.parameters()
    numbers = {spec.expert for spec in skeleton.linears() if spec.expert is not None}
    if not numbers:
        known = ", ".join(sorted(family.model_type for family in FAMILIES if family.experts is not None))
        raise UserError("the model has no experts that could go", f"use another method; families with experts: {known}")
    experts, groups = len(numbers), int(getattr(config, "n_group", None) or 1)
    index = skeleton.checkpoint.index
    weights = sum(spec.in_features * spec.out_features for spec in skeleton.linears() if spec.expert is not None)
    blocks = range(skeleton.num_blocks)
    routers = sum(math.prod(index[name].shape) for block in blocks for name in skeleton.router_tensors(block))
    per_expert = (weights + routers) // experts
    room = math.floor(stage.keep * total) - (total - experts * per_expert)
    kept = min(experts, room // per_expert // groups * groups)
    chosen = int(config.num_experts_per_tok)
    fewest = chosen
    if groups > 1:
        fewest = groups * max(math.ceil(chosen / int(config.topk_group)), SMALLEST_GROUP)
    problems = []
    if kept < fewest:
        smallest = (total - (experts - fewest) * per_expert) / total
        message = f"keep {stage.keep:g} would leave {max(kept, 0)} experts, and every token is routed to {chosen}"
        problems.append(Problem(message, f"with this model the smallest keep is {smallest:.3f}"))
        kept = fewest
    return ExpertsCut(kept, experts, groups, total - (experts - kept) * per_expert, total), problems


def config_of(job: ExpertsJob) -> dict[str, Any]:
    """config.json of the result: the source's with fewer experts; as many as before are chosen for a token."""
    config = dict(job.checkpoint.config)
    return {**config, **{name: job.cut.kept for name in COUNTS if name in config}}

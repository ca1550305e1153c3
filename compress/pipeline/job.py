"""A quantisation made concrete: every linear with its scheme, and what forbids the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compress.errors import UserError
from compress.models.skeleton import LinearSpec, Skeleton
from compress.pipeline.work import Problem, Work, ignored
from compress.quantization.configs import GptqConfig, MethodConfig, SmoothQuantConfig
from compress.recipe import QuantizeStage
from compress.types import FP8_TILE, Fp8Scheme, IntScheme, Scheme

NARROWEST_GROUP = 8


@dataclass(frozen=True, kw_only=True)
class Job(Work):
    """Everything a plan or a run of a quantisation needs."""

    stage: QuantizeStage
    schemes: dict[str, Scheme]
    """Scheme of every linear that will be quantised, by checkpoint name."""

    @property
    def scheme(self) -> Scheme:
        return self.stage.scheme.to_scheme()

    def integers(self, spec: LinearSpec) -> IntScheme:
        """The scheme of a linear under a method that knows integer grids alone; recipes refuse others."""
        scheme = self.schemes[spec.name]
        assert isinstance(scheme, IntScheme)
        return scheme

    @property
    def label(self) -> str:
        return self.scheme.label

    @property
    def rounding(self) -> MethodConfig:
        """The method that finds the codes in the end."""
        method = self.stage.method
        return method.rounding if isinstance(method, SmoothQuantConfig) else method

    @property
    def needs_blocks(self) -> bool:
        return self.stage.calibration is not None

    @property
    def needs_original(self) -> bool:
        return isinstance(self.rounding, GptqConfig) and self.rounding.correction > 0

    def scale_dtype(self, spec: LinearSpec) -> torch.dtype:
        """Scales are stored in the dtype of the weight they replace, which is what engines read."""
        return self.checkpoint.index[spec.weight].dtype


def nearest_group_size(widths: Sequence[int], wanted: int) -> int | None:
    """The divisor of all widths nearest to `wanted`, among those wide enough to be worth their scales."""
    common = math.gcd(*widths) if widths else 0
    divisors = [d for d in range(NARROWEST_GROUP, common + 1) if common % d == 0]
    return min(divisors, key=lambda d: (abs(math.log(d / wanted)), d), default=None)


def assign(stage: QuantizeStage, skeleton: Skeleton) -> tuple[dict[str, Scheme], dict[str, str], list[Problem]]:
    """The scheme of every linear that gets one, the reason of every other, and what forbids the run."""
    scheme = stage.scheme.to_scheme()
    specs = skeleton.linears()
    if not specs:
        raise UserError("the model has no linear in any decoder block", "check num_hidden_layers in its config.json")
    reasons, problems = ignored(stage.ignore, specs)
    wanted = [spec for spec in specs if spec.name not in reasons]
    problems += _misfits(scheme, wanted)
    for block in range(skeleton.num_blocks):
        for group in skeleton.fusion_groups(block):
            kept = [name for name in group if name in reasons]
            if kept and len(kept) < len(group):
                other = next(name for name in group if name not in reasons)
                said = f"{kept[0]} is ignored but {other} is not: engines load them as one matrix"
                problems.append(Problem(said, f"ignore all of {', '.join(group)}, or none"))
    if not wanted:
        problems.append(Problem("every linear is ignored: nothing is left to quantise", "ignore fewer linears"))
    return {spec.name: scheme for spec in wanted}, reasons, problems


def _misfits(scheme: Scheme, wanted: Sequence[LinearSpec]) -> list[Problem]:
    """One problem for every width that the group size does not divide, and one for experts whose inputs are rounded."""
    problems = []
    experts = [spec for spec in wanted if spec.expert is not None]
    if experts and scheme.inputs is not None:
        said = f"{scheme.name} rounds the inputs of {experts[0].name}, which fused experts have no place for"
        problems.append(Problem(said, "use a weight-only scheme, or leave them out with --ignore '*.experts.*'"))
    nearest = nearest_group_size(sorted({spec.in_features for spec in wanted}), scheme.group_size or 1)
    hint = "use --group-size channel, or leave those linears out with --ignore"
    if nearest is not None:
        hint = f"use --group-size {nearest} (the nearest that divides every width), or --group-size channel"
    shared = f"group size {scheme.group_size}"
    if isinstance(scheme, Fp8Scheme):
        shared = f"the tile of {scheme.name}, {FP8_TILE},"
        hint = "use FP8_DYNAMIC, or leave those linears out with --ignore"
    misfits = [spec for spec in wanted if not scheme.fits(spec.in_features)]
    for width in sorted({spec.in_features for spec in misfits}):
        names = [spec.name for spec in misfits if spec.in_features == width]
        others = f" and {len(names) - 1} others" if len(names) > 1 else ""
        said = f"{shared} does not divide the width {width} of {names[0]}{others}"
        problems.append(Problem(said, hint))
    return problems

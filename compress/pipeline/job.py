"""A quantisation made concrete: every linear with its scheme, and what forbids the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from compress.errors import UserError
from compress.formats.registry import FORMATS, Format
from compress.models.kv_cache import KEY_LINEARS
from compress.models.skeleton import LinearSpec, Skeleton
from compress.models.tables import is_tied, tables
from compress.pipeline.prune_job import pattern_misfits
from compress.pipeline.work import Problem, Work, ignored, matches
from compress.quantization.configs import AutoRoundConfig, GptqConfig, HadamardConfig, MethodConfig
from compress.schemes import table_label
from compress.stages import QuantizeStage
from compress.types import FP8_TILE, IntScheme, Scheme

NARROWEST_GROUP = 8


@dataclass(frozen=True, kw_only=True)
class Job(Work):
    """Everything a plan or a run of a quantisation needs."""

    stage: QuantizeStage
    schemes: dict[str, Scheme]
    """Scheme of every linear that will be quantised, the embedding among them, by checkpoint name."""
    curvature: Path | None = None
    """Where `curvature.py` has written what it measured; None where nobody asks for it."""

    @property
    def distinct_schemes(self) -> list[Scheme]:
        """The schemes that linears in blocks have, in their order; the recipe's own where no linear has one."""
        outside = {spec.name for spec in tables(self.skeleton)}
        inside = (scheme for name, scheme in self.schemes.items() if name not in outside)
        return list(dict.fromkeys(inside)) or [self.stage.scheme.to_scheme()]

    @property
    def tables(self) -> list[LinearSpec]:
        """The token embedding and the head, those of them that will be quantised."""
        return [spec for spec in tables(self.skeleton) if spec.name in self.schemes]

    def integers(self, spec: LinearSpec) -> IntScheme:
        """The scheme of a linear under a method that knows integer grids alone; recipes refuse others."""
        scheme = self.schemes[spec.name]
        assert isinstance(scheme, IntScheme)
        return scheme

    @property
    def label(self) -> str:
        first, *others = self.distinct_schemes
        layout = f"mixed-{self.bits_per_weight:.2f}b" if others else first.label
        bits = (None if each is None else each.bits for each in (self.stage.embeddings, self.stage.head))
        return layout + table_label(*bits) + ("-refined" if self.stage.refine is not None else "")

    def stored_bits(self, spec: LinearSpec) -> int:
        """Bits that a quantised linear takes, as its scheme counts them, or its format where that stores more."""
        scheme, dtype = self.schemes[spec.name], self.scale_dtype(spec)
        return self.format.stored_bits(scheme, spec.out_features, spec.in_features, dtype)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the linears that will be quantised, those apart that their scheme does not fit."""
        chosen = [s for s in (*self.skeleton.linears(), *self.tables) if s.name in self.schemes]
        chosen = [spec for spec in chosen if self.schemes[spec.name].fits(spec.in_features)]
        weights = sum(spec.in_features * spec.out_features for spec in chosen)
        return sum(self.stored_bits(spec) for spec in chosen) / weights if weights else 0.0

    @property
    def rounding(self) -> MethodConfig:
        """The method that finds the codes in the end."""
        method = self.stage.method
        return getattr(method, "rounding", None) or method

    @property
    def needs_blocks(self) -> bool:
        return self.stage.reads_text

    @property
    def needs_original(self) -> bool:
        return self.follows_all or (isinstance(self.rounding, GptqConfig) and self.rounding.correction > 0)

    @property
    def follows_all(self) -> bool:
        return isinstance(self.rounding, AutoRoundConfig)

    @property
    def format(self) -> Format:
        """What the linears are packed as."""
        return FORMATS[self.stage.format]

    def scale_dtype(self, spec: LinearSpec) -> torch.dtype:
        """Scales are stored in the dtype that the format has for them, or that of the weight they replace."""
        return self.format.scale_dtype or self.checkpoint.index[spec.weight].dtype


def nearest_group_size(widths: Sequence[int], wanted: int) -> int | None:
    """The divisor of all widths nearest to `wanted`, among those wide enough to be worth their scales."""
    common = math.gcd(*widths) if widths else 0
    divisors = [d for d in range(NARROWEST_GROUP, common + 1) if common % d == 0]
    return min(divisors, key=lambda d: (abs(math.log(d / wanted)), d), default=None)


def assign(stage: QuantizeStage, skeleton: Skeleton) -> tuple[dict[str, Scheme], dict[str, str], list[Problem]]:
    """The scheme of every linear that gets one, the reason of every other, and what forbids the run."""
    specs = skeleton.linears()
    if not specs:
        raise UserError("the model has no linear in any decoder block", "check num_hidden_layers in its config.json")
    reasons, problems = ignored(stage.ignore, specs)
    wanted = [spec for spec in specs if spec.name not in reasons]
    schemes, unmatched = _chosen(stage, wanted)
    problems += unmatched
    for scheme in dict.fromkeys(schemes.values()):
        specs_of = [spec for spec in wanted if schemes[spec.name] == scheme]
        problems += _misfits(scheme, specs_of) or _misplaced(FORMATS[stage.format], scheme, specs_of, skeleton)
    if isinstance(stage.method, GptqConfig) and (sparsity := stage.method.to_sparsity()) is not None:
        problems += pattern_misfits(sparsity, wanted)
    for block in range(skeleton.num_blocks):
        for group in skeleton.fusion_groups(block):
            kept = [name for name in group if name in reasons]
            if kept and len(kept) < len(group):
                other = next(name for name in group if name not in reasons)
                said = f"{kept[0]} is ignored but {other} is not: engines load them as one matrix"
                problems.append(Problem(said, f"ignore all of {', '.join(group)}, or none"))
            labels = {schemes[name].label: name for name in reversed(group) if name in schemes}
            if len(labels) > 1:
                said = " but ".join(f"{name} is {label}" for label, name in list(labels.items())[:-3:-1])
                said += ": engines load them as one matrix"
                problems.append(Problem(said, f"give all of {', '.join(group)} one scheme"))
    if stage.calibration is not None and stage.calibration.experts == "all" and all(s.expert is None for s in specs):
        said = "calibration.experts is `all`, and the model has no experts"
        problems.append(Problem(said, "leave calibration.experts (--experts) out"))
    if stage.kv_cache is not None:
        problems += _uncached(skeleton, schemes)
    outside, found = _tables(stage, skeleton)
    schemes, problems = {**schemes, **outside}, problems + found
    if not wanted:
        problems.append(Problem("every linear is ignored: nothing is left to quantise", "ignore fewer linears"))
    return schemes, reasons, problems


def _tables(stage: QuantizeStage, skeleton: Skeleton) -> tuple[dict[str, Scheme], list[Problem]]:
    """The schemes of embedding and head where they get one; of a tied one, that of either name."""
    asked = {"embeddings": stage.embeddings, "head": stage.head}
    given = {name: config.to_scheme() for name, config in asked.items() if config is not None}
    specs, problems = tables(skeleton), []
    if is_tied(skeleton) and given:
        if len(set(given.values())) > 1:
            said = "embedding and head of this model are one table, which cannot have two schemes"
            problems.append(Problem(said, "give `embeddings` or `head` alone"))
        if isinstance(stage.method, HadamardConfig) and stage.method.residual:
            said = "rotating the residual stream makes two tables of the tied embedding, which then stay as they are"
            problems.append(Problem(said, "set `residual: false`, or leave `embeddings` and `head` out"))
        given = {"embeddings": next(iter(given.values()))}
    chosen: dict[str, Scheme] = {}
    for name, spec in zip(("embeddings", "head"), specs, strict=False):
        if (scheme := given.get(name)) is not None:
            chosen[spec.name] = scheme
            problems += [
                Problem(found.message, f"give `{name}` another group size, or `channel`")
                for found in _misfits(scheme, [spec])
            ]
    return chosen, problems


def _uncached(skeleton: Skeleton, schemes: Mapping[str, Scheme]) -> list[Problem]:
    """A problem where a block has no quantised linear of keys, beside which scales of the cache could be stored."""
    for block in range(skeleton.num_blocks):
        names = [spec.name for spec in skeleton.linears(block) if spec.name in schemes]
        if not any(name.endswith(tuple(f".{linear}" for linear in KEY_LINEARS)) for name in names):
            said = (
                f"block {block} has no quantised {' or '.join(KEY_LINEARS)}, beside which scales of its cache could lie"
            )
            return [Problem(said, "leave kv_cache out, or do not ignore the attention")]
    return []


def _chosen(stage: QuantizeStage, wanted: Sequence[LinearSpec]) -> tuple[dict[str, Scheme], list[Problem]]:
    """The scheme of each linear, and a problem for every override that means none."""
    schemes: dict[str, Scheme] = dict.fromkeys((spec.name for spec in wanted), stage.scheme.to_scheme())
    problems = []
    for override in stage.overrides:
        for pattern in override.linears:
            hit = [spec.name for spec in wanted if matches(pattern, spec.name)]
            schemes.update(dict.fromkeys(hit, override.scheme.to_scheme()))
            if wanted and not hit:
                said = f"override pattern {pattern!r} matches no linear that is quantised"
                problems.append(
                    Problem(said, f"names look like {wanted[0].name}; give one, a glob, or re: and a regex")
                )
    return schemes, problems


def _misplaced(format: Format, scheme: Scheme, wanted: Sequence[LinearSpec], skeleton: Skeleton) -> list[Problem]:
    """What the format has no place for: one problem for every shape."""
    if format.name == "compressed-tensors":
        return []
    if conv1d := [spec for spec in wanted if spec.layout == "conv1d"]:
        said = f"{format.name} has no place for {conv1d[0].name}, which its model keeps transposed"
        return [Problem(said, "use --format compressed-tensors")]
    if not format.experts and (experts := [spec for spec in wanted if spec.expert is not None]):
        said = f"{format.name} has no place for {experts[0].name}, which its model keeps fused with others"
        return [Problem(said, "leave experts out with --ignore '*.experts.*', or use another scheme")]
    biased = [spec for spec in wanted if f"{spec.name}.bias" in skeleton.checkpoint.index]
    if biased and not format.biases:
        said = (
            f"{format.name} has no place for the bias of {biased[0].name}, which loaders multiply by the weight's scale"
        )
        return [Problem(said, "leave `format` out, or leave linears with biases out with --ignore")]
    problems, seen = [], set()
    for spec in wanted:
        found = format.shape_refusal(scheme, spec.out_features, spec.in_features)
        if found is not None and found.reason not in seen:
            seen.add(found.reason)
            problems.append(Problem(f"{spec.name}: {found.reason}", found.hint))
    return problems


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
    if not isinstance(scheme, IntScheme):
        shared = f"the tile of {scheme.name}, {scheme.group_size or FP8_TILE},"
        other = f"W{scheme.bits}A16-{f'g{nearest}' if nearest else 'channel'}"
        other = other if scheme.inputs is None else "FP8_DYNAMIC"
        hint = f"use --scheme {other}, or leave those linears out with --ignore"
    misfits = [spec for spec in wanted if not scheme.fits(spec.in_features)]
    for width in sorted({spec.in_features for spec in misfits}):
        names = [spec.name for spec in misfits if spec.in_features == width]
        others = f" and {len(names) - 1} others" if len(names) > 1 else ""
        said = f"{shared} does not divide the width {width} of {names[0]}{others}"
        problems.append(Problem(said, hint))
    return problems

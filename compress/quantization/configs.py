"""Settings of every quantisation method, free of torch so that recipes parse and help answers at once.

`MethodConfig` is the registry: the tagged union parses recipes, lists choices in errors and types the dispatch.
A new method costs one class here, one file beside it, one line in the union.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from compress.types import BlockFloatScheme, Fp8Scheme, IntScheme, Scheme, Sparsity, ternary_scheme


def short_form(value: object) -> object:
    """`gptq` is `{kind: gptq}`."""
    return {"kind": value} if isinstance(value, str) else value


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    summary: ClassVar[str]
    paper: ClassVar[str]
    calibrated: ClassVar[bool]
    usual_scheme: ClassVar[str | dict[str, Any] | None] = None
    """The scheme that a recipe means that names none; None: 4-bit weights."""

    warning: ClassVar[str | None] = None
    """What a run of it says before it begins."""

    def refusal(self, scheme: Scheme) -> str | None:
        """Why this method cannot make this scheme; None if it can."""
        return None


class RtnConfig(_Config):
    """Round to nearest on the min-max grid: data-free, the baseline every other method must beat."""

    kind: Literal["rtn"] = "rtn"
    scale_search: bool = Field(
        False, description="choose each group's scale by the least squared weight error instead of covering min-max"
    )

    summary: ClassVar[str] = "round to nearest; data-free, seconds"
    paper: ClassVar[str] = "arXiv:1712.05877"
    calibrated: ClassVar[bool] = False

    def refusal(self, scheme: Scheme) -> str | None:
        """FP8 in large groups has no ranges worth a search."""
        if self.scale_search and isinstance(scheme, Fp8Scheme):
            return (
                f"scale_search is for integers: FP8 keeps its precision over its range, so {scheme.name} gains nothing"
            )
        return None


class HqqConfig(_Config):
    """HQQ: data-free; grids fitted by half-quadratic steps to all but the largest errors."""

    kind: Literal["hqq"] = "hqq"
    p: float = Field(0.7, gt=0.0, le=1.0, description="a weight's error counts by this power; small forgives outliers")
    beta: float = Field(
        10.0,
        gt=0.0,
        description="how far errors are forgiven: the larger, the smaller the errors that the fit leaves out",
    )
    kappa: float = Field(1.01, ge=1.0, le=2.0, description="factor by which beta grows with every step")
    steps: int = Field(20, ge=1, le=200, description="half-quadratic steps; every group keeps its best")
    scale_search: bool = Field(False, description="start from the range of least squared error instead of min-max")

    summary: ClassVar[str] = "data-free fit of scales and zero points; for --asym, a little better than rtn"
    paper: ClassVar[str] = "mobiusml.github.io/hqq_blog"
    calibrated: ClassVar[bool] = False
    usual_scheme: ClassVar[str | dict[str, Any] | None] = "W4A16_ASYM"

    def refusal(self, scheme: Scheme) -> str | None:
        """It fits integer grids."""
        return None if isinstance(scheme, IntScheme) else f"hqq rounds to integers, not to {scheme.name}: use rtn"


class SweepConfig(_Config):
    """Round to nearest on scales that weigh each group's rounding error with its inputs' second moments."""

    kind: Literal["sweep"] = "sweep"

    summary: ClassVar[str] = "scales by the error of outputs, then round to nearest; what gptq adds error feedback to"
    paper: ClassVar[str] = "arXiv:2210.17323"
    calibrated: ClassVar[bool] = True

    def refusal(self, scheme: Scheme) -> str | None:
        """Scales must belong to groups of inputs."""
        if not isinstance(scheme, IntScheme | BlockFloatScheme):
            return f"sweep is for scales of groups of integers and for blocks of floats, not for {scheme.name}: use rtn"
        return None


class GptqConfig(_Config):
    """GPTQ with static groups, activation order, Hessian-weighted scale search and coordinate-descent polish."""

    kind: Literal["gptq"] = "gptq"
    damp_frac: float = Field(0.01, ge=0.0, lt=1.0, description="damping as a share of the mean Hessian diagonal")
    act_order: bool = Field(True, description="quantise columns by falling Hessian diagonal; groups stay as stored")
    scale_search: bool = Field(True, description="choose each group's scale by Hessian-weighted error")
    descent_sweeps: int = Field(
        4, ge=0, le=64, description="coordinate-descent sweeps over the codes after GPTQ (0: plain GPTQ)"
    )
    refit_rounds: int = Field(
        1,
        ge=0,
        le=16,
        description="rounds of least-squares refit of integer scales, each followed by a descent; block scales stay",
    )
    correction: float = Field(
        1.0,
        ge=0.0,
        le=1.0,
        description="share of the error of earlier layers that each layer is asked to undo; left out with W8A8: 0",
    )
    curvature_windows: int = Field(
        0,
        ge=0,
        le=4096,
        exclude_if=lambda count: count == 0,  # such a recipe keeps the hash that it always had
        description="calibration windows that tell how the outputs of a linear make up for each other in the KL;"
        " codes then descend on that too (0: every output by itself)",
    )

    sparsity: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="share of each linear's weights that SparseGPT removes first, in one pass",
    )
    pattern: str | None = Field(None, description="the same as n:m, such as 2:4, in place of `sparsity`")

    @model_validator(mode="after")
    def _one_amount(self) -> GptqConfig:
        if self.sparsity is not None and self.pattern is not None:
            raise ValueError("takes `sparsity` or `pattern`, not both")
        if self.pattern is not None:
            Sparsity.parse(self.pattern)
        return self

    def to_sparsity(self) -> Sparsity | None:
        """What is removed before rounding; None: nothing."""
        if self.pattern is not None:
            return Sparsity.parse(self.pattern)
        return None if self.sparsity is None else Sparsity(self.sparsity)

    summary: ClassVar[str] = "error feedback through the Hessian, layer by layer; best quality per bit"
    paper: ClassVar[str] = "arXiv:2210.17323, arXiv:2504.02692"
    calibrated: ClassVar[bool] = True

    def refusal(self, scheme: Scheme) -> str | None:
        """Codes are found on integer grids, or in blocks of floats."""
        if not isinstance(scheme, IntScheme | BlockFloatScheme):
            return f"gptq rounds to integers and to blocks of floats, not to {scheme.name}: use rtn"
        if self.to_sparsity() is not None and not isinstance(scheme, IntScheme):
            return f"zeros and codes in one pass are integers, not {scheme.name}: prune first, then quantise"
        if self.curvature_windows and not isinstance(scheme, IntScheme):
            return f"curvature_windows is for integers, not for {scheme.name}: leave it out"
        return None


def _without_curvature(rounding: RtnConfig | GptqConfig | None) -> RtnConfig | GptqConfig | None:
    """The rounding of a method that folds scales into outputs, whose curvature is then another than was measured."""
    if isinstance(rounding, GptqConfig) and rounding.curvature_windows:
        raise ValueError("folds scales into outputs, which `curvature_windows` cannot follow: leave it out")
    return rounding


class AutoRoundConfig(_Config):
    """AutoRound: learns, block by block and by signs of gradients, which way each weight is rounded, and the ranges."""

    kind: Literal["autoround"] = "autoround"
    steps: int = Field(200, ge=1, le=100_000, description="steps in each block")
    windows: int = Field(8, ge=1, le=4096, description="calibration windows per step")
    reach: float = Field(
        0.5, ge=0.0, le=1.0, description="how far all steps together can move a weight before it is rounded, in codes"
    )
    range_reach: float = Field(
        0.1, ge=0.0, le=0.5, description="how far they can move the range of a group, as a share of it"
    )
    held_out: float = Field(0.125, gt=0.0, lt=1.0, description="share of the windows that only choose the best state")
    checks: int = Field(8, ge=1, description="how often the held-out windows are looked at in each block")

    summary: ClassVar[str] = "learns each weight's rounding by sign steps on the output of its block"
    paper: ClassVar[str] = "arXiv:2309.05516"
    calibrated: ClassVar[bool] = True

    def refusal(self, scheme: Scheme) -> str | None:
        """Codes are learnt on integer grids, with inputs as they are."""
        if scheme.inputs is None and isinstance(scheme, IntScheme):
            return None
        return f"autoround is for integer weights alone, not {scheme.name}: use gptq"


class AwqConfig(_Config):
    """Activation-aware scaling of salient channels, folded into the layer before, then a search of the clip."""

    kind: Literal["awq"] = "awq"
    scale_search: bool = Field(True, description="search channel scales; off leaves every scale at the identity")
    grid: int = Field(20, ge=2, le=200, description="points of the exponent grid; identity is always tried as well")
    duo_scaling: bool = Field(True, description="try the activation/weight scale too, not the activation one alone")
    clip: bool = Field(True, description="search the clipping of each group by output error")
    rounding: Annotated[RtnConfig | GptqConfig, Field(discriminator="kind")] | None = Field(
        None, description="what rounds the scaled weights in place of the clip search: rtn or gptq, with their settings"
    )

    summary: ClassVar[str] = "scales salient channels by activation size, then clips; fast, robust to outliers"
    paper: ClassVar[str] = "arXiv:2306.00978"
    calibrated: ClassVar[bool] = True

    _short = field_validator("rounding", mode="before")(short_form)
    _unfolded = field_validator("rounding")(_without_curvature)

    def refusal(self, scheme: Scheme) -> str | None:
        """Its scales serve the rounding of weights alone, on integer grids."""
        if scheme.inputs is None:
            return None if isinstance(scheme, IntScheme) else f"awq is for integers, not {scheme.name}: use gptq"
        return f"awq is for weights alone, and {scheme.name} rounds inputs too: use smoothquant, gptq or rtn"


class SmoothQuantConfig(_Config):
    """Ranges moved from inputs into weights, folded into the layer before; then another method rounds."""

    kind: Literal["smoothquant"] = "smoothquant"
    grid: int = Field(21, ge=2, le=101, description="values of alpha tried per edge, from 0 to 1, besides the identity")
    least_gain: float = Field(
        0.5, ge=0.0, lt=1.0, description="share of an edge's error that smoothing must remove, or it stays as it is"
    )
    rounding: Annotated[RtnConfig | GptqConfig, Field(discriminator="kind")] = Field(
        RtnConfig(scale_search=False),
        description="what rounds the smoothed weights: rtn or gptq, with settings of their own",
    )

    summary: ClassVar[str] = (
        "moves outliers of inputs into weights, alpha searched per edge; for schemes that round both"
    )
    paper: ClassVar[str] = "arXiv:2211.10438"
    calibrated: ClassVar[bool] = True
    usual_scheme: ClassVar[str | dict[str, Any] | None] = "W8A8"

    _short = field_validator("rounding", mode="before")(short_form)
    _unfolded = field_validator("rounding")(_without_curvature)

    def refusal(self, scheme: Scheme) -> str | None:
        """There must be inputs to smooth, and the rounding must know the scheme."""
        if scheme.inputs is None:
            return f"smoothquant is for schemes that round inputs, such as W8A8, and {scheme.name} does not"
        return self.rounding.refusal(scheme)


class RefineConfig(BaseModel):
    """After the method: scales and norms tuned on the KL of the whole model's next-token distributions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(100, ge=1, le=100_000, description="optimiser steps")
    windows: int = Field(4, ge=1, le=4096, description="calibration windows per step")
    scale_rate: float = Field(3e-3, ge=0.0, lt=1.0, description="first step size of scales, relative to each")
    norm_rate: float = Field(2e-3, ge=0.0, lt=1.0, description="first step size of norms, relative to their mean size")
    held_out: float = Field(0.125, gt=0.0, lt=1.0, description="share of the windows that only choose the best state")
    checks: int = Field(8, ge=1, description="how often the held-out windows are looked at")
    code_rounds: int = Field(
        0,
        ge=0,
        le=100,
        description="how often codes and zero points are then moved by whole steps, where the KL's curvature wants it",
        exclude_if=lambda count: count == 0,  # such a recipe keeps the hash that it always had
    )

    summary: ClassVar[str] = "tunes scales and norms end to end on the KL to the original; same format, same bytes"
    paper: ClassVar[str] = "arXiv:2407.11062"

    def refusal(self, scheme: Scheme) -> str | None:
        """Only integer grids have scales that are free to move."""
        return (
            None if isinstance(scheme, IntScheme) else f"refine tunes integer schemes, not {scheme.name}: leave it out"
        )


class HadamardConfig(_Config):
    """Random Hadamard rotations of the residual stream and of the heads, fused into the weights; then a rounding."""

    kind: Literal["hadamard"] = "hadamard"
    residual: bool = Field(True, description="rotate the residual stream (R1); a tied head becomes a tensor of its own")
    heads: bool = Field(True, description="rotate the values of each head and what o_proj reads of them (R2)")
    rounding: Annotated[RtnConfig | GptqConfig, Field(discriminator="kind")] = Field(
        GptqConfig.model_validate({}),
        description="what rounds the rotated weights: rtn or gptq, with their settings",
    )

    summary: ClassVar[str] = "spreads outliers over all channels by rotations fused into the weights, then rounds"
    paper: ClassVar[str] = "arXiv:2404.00456, arXiv:2405.16406"
    calibrated: ClassVar[bool] = True

    _short = field_validator("rounding", mode="before")(short_form)

    @model_validator(mode="after")
    def _rotates_something(self) -> HadamardConfig:
        if not (self.residual or self.heads):
            raise ValueError("rotates nothing: set `residual` or `heads`")
        return self

    def refusal(self, scheme: Scheme) -> str | None:
        """The rounding must know the scheme."""
        return self.rounding.refusal(scheme)


class TernaryConfig(_Config):
    """BitNet b1.58: every weight -1, 0 or 1 times the mean magnitude of its matrix."""

    kind: Literal["ternary"] = "ternary"

    summary: ClassVar[str] = "weights of -1, 0 and 1 with one scale per matrix; for models trained for it"
    paper: ClassVar[str] = "arXiv:2402.17764"
    calibrated: ClassVar[bool] = False
    usual_scheme: ClassVar[str | dict[str, Any] | None] = {"bits": 2, "group_size": "channel"}
    warning: ClassVar[str | None] = (
        "ternary is for models that were trained for it; any other loses nearly all that it knows"
    )

    def refusal(self, scheme: Scheme) -> str | None:
        """Three codes need two bits, and a matrix has one scale, which every row repeats."""
        if scheme in (IntScheme(2, None), ternary_scheme()):
            return None
        return "ternary weights are stored in 2 bits with a scale per channel: give --bits 2 --group-size channel --sym"


MethodConfig = Annotated[
    RtnConfig
    | HqqConfig
    | TernaryConfig
    | SweepConfig
    | GptqConfig
    | AutoRoundConfig
    | AwqConfig
    | SmoothQuantConfig
    | HadamardConfig,
    Field(discriminator="kind"),
]

METHODS: dict[str, type[_Config]] = {c.model_fields["kind"].default: c for c in get_args(get_args(MethodConfig)[0])}
METHOD_NAMES: tuple[str, ...] = tuple(METHODS)

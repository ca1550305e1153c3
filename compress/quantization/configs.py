"""Settings of every quantisation method, free of torch so that recipes parse and help answers at once.

`MethodConfig` is the registry: the tagged union parses recipes, lists choices in errors and types the dispatch.
A new method costs one class here, one file beside it, one line in the union.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    summary: ClassVar[str]
    paper: ClassVar[str]
    calibrated: ClassVar[bool]


class RtnConfig(_Config):
    """Round to nearest on the min-max grid: data-free, the baseline every other method must beat."""

    kind: Literal["rtn"] = "rtn"
    scale_search: bool = Field(
        False, description="shrink each group's range to the least squared weight error instead of covering min-max"
    )

    summary: ClassVar[str] = "round to nearest; data-free, seconds"
    paper: ClassVar[str] = "arXiv:1712.05877"
    calibrated: ClassVar[bool] = False


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
        1, ge=0, le=16, description="rounds of least-squares refit of the scales, each followed by a descent"
    )
    correction: float = Field(
        1.0, ge=0.0, le=1.0, description="share of the error of earlier layers that each layer is asked to undo"
    )

    summary: ClassVar[str] = "error feedback through the Hessian, layer by layer; best quality per bit"
    paper: ClassVar[str] = "arXiv:2210.17323, arXiv:2504.02692"
    calibrated: ClassVar[bool] = True


class AwqConfig(_Config):
    """Activation-aware scaling of salient channels, folded into the layer before, then a search of the clip."""

    kind: Literal["awq"] = "awq"
    scale_search: bool = Field(True, description="search channel scales; off leaves every scale at the identity")
    grid: int = Field(20, ge=2, le=200, description="points of the exponent grid; identity is always tried as well")
    duo_scaling: bool = Field(True, description="try the activation/weight scale too, not the activation one alone")
    clip: bool = Field(True, description="search the clipping of each group by output error")

    summary: ClassVar[str] = "scales salient channels by activation size, then clips; fast, robust to outliers"
    paper: ClassVar[str] = "arXiv:2306.00978"
    calibrated: ClassVar[bool] = True


MethodConfig = Annotated[RtnConfig | GptqConfig | AwqConfig, Field(discriminator="kind")]

METHODS: dict[str, type[_Config]] = {c.model_fields["kind"].default: c for c in get_args(get_args(MethodConfig)[0])}
METHOD_NAMES: tuple[str, ...] = tuple(METHODS)

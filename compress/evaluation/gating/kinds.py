"""The kinds of gate that a policy may hold, each with its limit. What each measures is in the `measure_*` modules.

A new kind is one class here, one entry in `GateSpec`, and one function in the module that measures its subject.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Role = Literal["primary", "secondary"]
Device = Literal["cpu", "cuda"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Above0 = Annotated[float, Field(gt=0.0)]


class Section(BaseModel):
    """Frozen, unknown keys refused, no NaN and no infinity: a typing error never loosens a gate."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Gate(Section):
    """`id` names the gate in reports. A `primary` gate decides; a `secondary` one is shown and warned about.

    `baseline` names the baseline that the candidate is held against, the first one given if it is left out.
    `lockstep` tells whether the measure needs both models to have been scored together.
    """

    lockstep: ClassVar[bool] = False
    id: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    role: Role = "primary"
    baseline: str | None = None


class TextGate(Gate):
    """A measure of one scored text: `text` by name, the policy's (or the record's first) if it is left out."""

    text: str | None = None


class MeanGate(TextGate):
    """A ratio of sums over clusters. `interval`: Student t over clusters, or the BCa bootstrap for skewed ones."""

    interval: Literal["t", "bca"] = "t"


class DeviceGate(Gate):
    """A measure of one machine: SKIPPED, never passed, where the scores come from another `device`."""

    device: Device | None = None


class SizeRatio(Gate):
    """Weight files of the baseline must be at least `min` times as large as the candidate's."""

    kind: Literal["size_ratio"]
    min: Above0


class BytesMax(Gate):
    """The candidate's weight files may take at most `max` bytes."""

    kind: Literal["bytes_max"]
    max: int = Field(gt=0)


class BitsPerWeightMax(Gate):
    """Stored bits per weight of the whole file, scales, zero points and unquantised tensors counted."""

    kind: Literal["bits_per_weight_max"]
    max: Above0


class PplRatio(MeanGate):
    """Perplexity may rise by at most this share: 0.04 allows 4%."""

    kind: Literal["ppl_ratio"]
    max_increase: float = Field(gt=-1.0)


class KlMean(MeanGate):
    """Mean KL(baseline || candidate) per token, in nats, may be at most `max`."""

    lockstep: ClassVar[bool] = True
    kind: Literal["kl_mean"]
    max: Above0


class KlIncrease(MeanGate):
    """Against an earlier release on the same tokens: KL to the common baseline may grow by at most this share."""

    kind: Literal["kl_increase"]
    max_increase: float = Field(gt=-1.0)


class KlP999(TextGate):
    """At most one token in a thousand may have a KL above `max` nats: mean KL hides rare disasters."""

    lockstep: ClassVar[bool] = True
    kind: Literal["kl_p999"]
    max: Above0


class Top1Agreement(TextGate):
    """The likeliest token must be the baseline's for at least this share of the tokens.

    `confident` looks only at tokens where the baseline gives its likeliest token more than half of the probability.
    """

    lockstep: ClassVar[bool] = True
    kind: Literal["top1_agreement"]
    min: Fraction
    confident: bool = False


class DpRms(MeanGate):
    """Root mean square change of the correct token's probability may be at most `max`."""

    lockstep: ClassVar[bool] = True
    kind: Literal["dp_rms"]
    max: Above0


class DpTail(TextGate):
    """The correct token may lose at most `max_drop` of probability at the lower percentile (1% or 0.1%) of the tokens.

    The record keeps no counts that would bound this percentile, so the estimate itself is compared, and the gate can
    only be secondary.
    """

    lockstep: ClassVar[bool] = True
    kind: Literal["dp_tail"]
    max_drop: Fraction
    percentile: Literal["1%", "0.1%"] = "1%"

    @model_validator(mode="after")
    def _only_shown(self) -> DpTail:
        if self.role == "primary":
            raise ValueError('dp_tail has no confidence bound: give it role = "secondary", or gate on dp_rms')
        return self


class AccuracyPaired(Gate):
    """Accuracy on `task` may fall by less than `margin` points, item by item against the baseline.

    `max_flips`: at most this share of the items may change between right and wrong, in either direction. `flips` is
    what `--plan` reckons with where nothing has been scored yet; `items` how many items to score then (None: all).
    The interval is the outer one of Agresti and Min's and Tango's. There is no choice: either alone errs more often
    than alpha says, and Agresti and Min's passes up to 12% of the candidates that lie on the margin at an alpha of 5%.
    """

    kind: Literal["accuracy_paired"]
    task: str
    margin: float = Field(ge=0.0, le=100.0)
    max_flips: Fraction | None = None
    flips: Annotated[float, Field(gt=0.0, le=1.0)] = 0.05
    items: int | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _one_interval(cls, values: Any) -> Any:
        if isinstance(values, dict) and "interval" in values:
            raise ValueError(
                "accuracy_paired takes no `interval`: its bounds are the outer ones of Agresti and Min's and Tango's, "
                "because either alone errs more often than alpha says"
            )
        return values

    @model_validator(mode="after")
    def _can_pass(self) -> AccuracyPaired:
        if self.role == "primary" and self.margin == 0.0:
            raise ValueError("no amount of items proves a loss of less than 0 points: give a margin above 0")
        return self


class GenerationIdentical(Gate):
    """At least this share of the greedy answers must be the baseline's, token by token."""

    lockstep: ClassVar[bool] = True
    kind: Literal["generation_identical"]
    min: Fraction


class Degenerate(Gate):
    """At most this share of the candidate's greedy answers may repeat themselves; `max_empty` of them may be empty."""

    kind: Literal["degenerate"]
    max: Fraction
    max_empty: Fraction | None = None


class SpeedRatio(DeviceGate):
    """The candidate must be at least `min` times as fast as the baseline, measured in turns on one machine."""

    lockstep: ClassVar[bool] = True
    kind: Literal["speed_ratio"]
    min: Above0
    what: Literal["prefill", "decode", "batched forward", "batched decode"] = "decode"
    batch: int = Field(default=1, ge=1)


class PeakMemoryRatio(DeviceGate):
    """The candidate's peak memory may be at most `max` times the baseline's."""

    kind: Literal["peak_memory_ratio"]
    max: Above0


class LoadTime(DeviceGate):
    """Seconds to load the candidate with its files in the page cache may be at most `max`."""

    kind: Literal["load_time"]
    max: Above0


class NoDenseFallback(DeviceGate):
    """No packed weight may have been decoded beforehand: memory and bytes read must be those of the packed format."""

    kind: Literal["no_dense_fallback"]


GateSpec = Annotated[
    SizeRatio
    | BytesMax
    | BitsPerWeightMax
    | PplRatio
    | KlMean
    | KlIncrease
    | KlP999
    | Top1Agreement
    | DpRms
    | DpTail
    | AccuracyPaired
    | GenerationIdentical
    | Degenerate
    | SpeedRatio
    | PeakMemoryRatio
    | LoadTime
    | NoDenseFallback,
    Field(discriminator="kind"),
]
SizeGate = SizeRatio | BytesMax | BitsPerWeightMax
CostGate = SpeedRatio | PeakMemoryRatio | LoadTime | NoDenseFallback
AnswerGate = GenerationIdentical | Degenerate

"""The stages of a recipe: quantise, prune, distil. What contradicts itself is refused here, before any work."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, StrictInt, StrictStr, field_validator, model_validator

from compress.distillation.configs import ForwardKlConfig, LossConfig
from compress.errors import UserError
from compress.formats.names import FormatName
from compress.formats.names import refusal as not_carried_by
from compress.formats.names import usual as usual_format
from compress.pruning.configs import PruningConfig, keeps_statistics
from compress.quantization.configs import METHODS, GptqConfig, MethodConfig, RefineConfig, short_form
from compress.recipe_sections import (
    AnyScheme,
    CalibrationConfig,
    SchemeConfig,
    Section,
    needs_calibration,
    scheme_settings,
)
from compress.schemes import parse_scheme, parse_weight_scheme
from compress.types import Scheme, Sparsity

DEFAULT_MINUTES = 8.0
ALL_TOKENS = ("gptq", "awq")
"""Methods that can have experts learn from all tokens."""
CHOOSING = ("autoround",)
"""Methods that hold windows out, whose copies they would learn from."""


def _switch(value: object) -> object:
    """`refine: true` is `refine: {}`, and `refine: false` is none."""
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


def _spelled_out(value: object) -> object:
    """`scheme: FP8_DYNAMIC` is `scheme: {name: FP8_DYNAMIC}`, `scheme: W3A16` is `scheme: {bits: 3}`."""
    if not isinstance(value, str):
        return value
    try:
        return scheme_settings(parse_scheme(value))
    except UserError as error:
        raise ValueError(f"is no scheme ({error.message}); {error.hint}") from None


def _table_scheme(value: object) -> object:
    """`embeddings: w6a16-g64` is `embeddings: {bits: 6, group_size: 64}`."""
    if not isinstance(value, str):
        return value
    if (found := parse_weight_scheme(value)) is None:
        raise ValueError("is no layout of integers for weights alone; give one such as w8a16-channel or w6a16-g64")
    return found


TableScheme = Annotated[SchemeConfig | None, BeforeValidator(_table_scheme)]


class Override(Section):
    """Linears, by name or pattern as in `ignore`, that get a scheme of their own; nothing is inherited."""

    linears: list[StrictStr] = Field(min_length=1)
    scheme: Annotated[AnyScheme, BeforeValidator(_spelled_out)]


class QuantizeStage(Section):
    """One pass of one method over the linears of the decoder blocks, `ignore` apart; later `overrides` win.

    embeddings, head: layouts of the token embedding and of the output projection, which stay as they are if left out;
    of a model that ties the two, either one stands for both.
    """

    kind: Literal["quantize"] = "quantize"
    method: Annotated[MethodConfig, BeforeValidator(short_form)]
    scheme: Annotated[AnyScheme, BeforeValidator(_spelled_out)] = SchemeConfig()
    overrides: list[Override] = Field(default_factory=list)
    ignore: list[StrictStr] = Field(default_factory=list)
    embeddings: TableScheme = None
    head: TableScheme = None
    format: FormatName = "compressed-tensors"
    kv_cache: Literal["fp8"] | None = None
    refine: Annotated[RefineConfig | None, BeforeValidator(_switch)] = None
    calibration: CalibrationConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _usual_scheme(cls, data: Any) -> Any:
        """A method that is for another layout than 4-bit weights brings its own where the recipe names none."""
        if not isinstance(data, dict) or data.get("scheme"):
            return data
        method = data.get("method")
        config = METHODS.get(str(method.get("kind") if isinstance(method, dict) else method))
        usual = None if config is None else config.usual_scheme
        if data.get("format") == "bitnet":
            usual = "W2A8"
        return data if usual is None else {**data, "scheme": usual}

    @model_validator(mode="after")
    def _usual_format(self) -> QuantizeStage:
        """What engines load the scheme from, where the recipe names no format."""
        if "format" not in self.model_fields_set:
            object.__setattr__(self, "format", usual_format(self.scheme.to_scheme()))
        return self

    @model_validator(mode="after")
    def _usual_correction(self) -> QuantizeStage:
        """With 8 bits on both sides what earlier layers did wrong is mostly noise of rounded inputs: nothing to undo.

        Only where the recipe leaves it open; the resolved recipe says 0.
        """
        if all(scheme.bits == 8 and scheme.inputs is not None for scheme in self.schemes):
            object.__setattr__(self, "method", _uncorrected(self.method))
        return self

    @model_validator(mode="after")
    def _parts_go_together(self) -> QuantizeStage:
        for scheme in self.schemes:
            refusal = self.method.refusal(scheme) or (None if self.refine is None else self.refine.refusal(scheme))
            if refusal:
                raise ValueError(refusal)
            if not_carried := not_carried_by(self.format, scheme):
                raise ValueError(f"{not_carried.reason}: {not_carried.hint}")
        if self.format == "bitnet" and self.method.kind != "ternary":
            raise ValueError(f"bitnet holds -1, 0 and 1, which ternary makes, and {self.method.kind} does not")
        if self.format == "gptq" and not all(scheme.symmetric for scheme in self.schemes):
            # Which zero points come out is known too late, when a run of hours has found one.
            raise ValueError("gptq v1 cannot store a zero point of 0, which asymmetric weights may have: use gptq-v2")
        if self.refine is not None and self.format != "compressed-tensors":
            raise ValueError("refine tunes compressed-tensors: leave one of `format` and `refine` out")
        for name in ("embeddings", "head"):
            if getattr(self, name) is not None and self.format != "compressed-tensors":
                raise ValueError(f"{name}: {self.format} has no place for it: leave one of the two out")
        if self.kv_cache is not None and self.schemes[0].inputs is None:
            said = f"scales of a cache go with a scheme that rounds inputs, not {self.schemes[0].name}"
            raise ValueError(f"kv_cache: {said}")
        if self.kv_cache is not None and self.refine is not None:
            raise ValueError("kv_cache: refine would move what its scales were calibrated on: leave one of the two out")
        if self.kv_cache is not None and self.format != "compressed-tensors":
            raise ValueError("kv_cache: its scales are written in compressed-tensors: leave `format` out")
        return _with_calibration(self, self.reads_text or self.refine is not None)

    @property
    def schemes(self) -> list[Scheme]:
        """The layouts of this stage: its own, and those of its overrides."""
        return [config.to_scheme() for config in (self.scheme, *(each.scheme for each in self.overrides))]

    @property
    def reads_text(self) -> bool:
        """Whether the method, the cache or a layout learns from calibration text, refining aside."""
        return self.method.calibrated or self.kv_cache is not None or any(map(needs_calibration, self.schemes))


class PruneStage(Section):
    """One pass of one pruning method.

    `sparsity`, a share of each linear's weights, or a `pattern` such as 2:4; of a structured method `keep`, the share
    of all parameters that stays. `allocation` shares a sparsity out among the blocks, by their outliers (owl) or their
    spectra (alphapruning), in place of evenly. `format` sparse-bitmask stores one bit for each weight, and those that
    stay: smaller on disk, for our own reader. `stats` is a directory where what a cut measures of the whole model is
    kept for other amounts.
    """

    kind: Literal["prune"] = "prune"
    method: Annotated[PruningConfig, BeforeValidator(short_form)]
    sparsity: float | None = Field(default=None, gt=0.0, lt=1.0)
    pattern: StrictStr | None = None
    keep: float | None = Field(default=None, gt=0.0, lt=1.0)
    allocation: Literal["uniform", "owl", "alphapruning"] = "uniform"
    format: Literal["dense", "sparse-bitmask"] = "dense"
    ignore: list[StrictStr] = Field(default_factory=list)
    stats: StrictStr | None = Field(default=None, min_length=1)
    calibration: CalibrationConfig | None = None

    @field_validator("pattern")
    @classmethod
    def _pattern(cls, value: str | None) -> str | None:
        if value is not None:
            Sparsity.parse(value)
        return value

    @model_validator(mode="after")
    def _one_amount(self) -> PruneStage:
        if self.method.structured:
            if self.keep is None or self.sparsity is not None or self.pattern is not None:
                raise ValueError(f"{self.method.kind} needs `keep`, such as 0.75, and no other amount")
            if self.ignore:
                raise ValueError(f"{self.method.kind} cuts all blocks alike: remove `ignore`")
        elif self.keep is not None:
            raise ValueError(f"{self.method.kind} removes single weights: give `sparsity` or `pattern`, not `keep`")
        elif (self.sparsity is None) == (self.pattern is None):
            raise ValueError("needs either `sparsity`, such as 0.5, or `pattern`, such as 2:4")
        return self

    @model_validator(mode="after")
    def _zeros_are_packed(self) -> PruneStage:
        if self.method.structured and self.format != "dense":
            raise ValueError(f"{self.method.kind} leaves no zeros that {self.format} could pack")
        return self

    @model_validator(mode="after")
    def _statistics_are_of_the_whole_model(self) -> PruneStage:
        if self.stats is not None and self.allocation == "owl":
            raise ValueError("stats: owl measures outliers of its own and keeps none: leave one of the two out")
        if self.stats is not None and not keeps_statistics(self.method):
            raise ValueError(
                f"stats: {self.method.kind} with these settings measures block by block as it goes, and keeps nothing"
            )
        return self

    @model_validator(mode="after")
    def _allocation_shares_a_sparsity(self) -> PruneStage:
        if self.allocation != "uniform" and self.sparsity is None:
            raise ValueError(f"allocation {self.allocation} shares out a `sparsity`: a pattern or a cut is uniform")
        return self

    @model_validator(mode="after")
    def _calibration_goes_with_method(self) -> PruneStage:
        return _with_calibration(self, self.method.calibrated or self.allocation == "owl")

    def to_sparsity(self) -> Sparsity:
        """The amount as the rest of the library passes it around."""
        if self.pattern is not None:
            return Sparsity.parse(self.pattern)
        assert self.sparsity is not None
        return Sparsity(self.sparsity)


class AnswersConfig(Section):
    """How the teacher answers prompts: up to so many tokens each, drawn at this temperature (0: the likeliest).

    prompt_tokens: what is left of a longer prompt; left out, prompts are not cut.
    """

    max_tokens: StrictInt = Field(default=64, ge=1)
    temperature: float = Field(default=1.0, ge=0.0, le=100.0)
    prompt_tokens: StrictInt | None = Field(default=None, ge=2)


class DistillText(Section):
    """Which text the student learns on: `samples` windows of `seq_len` tokens of `source`, all it has if left out.

    `held_out` of them are only measured on. `source` is as in CalibrationConfig. With `answers` its lines or rows are
    prompts: the teacher answers them first, and its answers are what the student learns.
    """

    source: StrictStr = Field(default="tales", min_length=1)
    samples: StrictInt | None = Field(default=None, ge=4)
    seq_len: StrictInt = Field(default=256, ge=2)
    held_out: StrictInt = Field(default=16, ge=2)
    answers: Annotated[AnswersConfig | None, BeforeValidator(_switch)] = None


class DistillStage(Section):
    """A student learns from a teacher: the source of the stage from the model at `teacher`.

    teacher: left out, the model that a run of several stages begins with, else the packaged model. minutes, or steps:
    how long; a run by minutes measures at its start how many steps they are, and its resolved recipe holds both.
    lora_rank: 0 trains all weights. learning_rate: left out, what suits adapters or all weights. batch_size: windows.
    cache: a directory where what the teacher says is kept, for the losses `topk-kl` and `sampled-kl`.
    """

    kind: Literal["distill"] = "distill"
    method: Annotated[LossConfig, BeforeValidator(short_form)] = Field(
        default_factory=lambda: ForwardKlConfig.model_validate({})
    )
    teacher: StrictStr | None = None
    minutes: float | None = Field(default=None, gt=0.0, le=100_000.0)
    steps: StrictInt | None = Field(default=None, ge=1)
    lora_rank: StrictInt = Field(default=16, ge=0, le=4096)
    learning_rate: float | None = Field(default=None, gt=0.0, le=1.0)
    batch_size: StrictInt = Field(default=8, ge=2, multiple_of=2)
    patience: StrictInt = Field(default=5, ge=1)
    cache: StrictStr | None = Field(default=None, min_length=1)
    calibration: DistillText = DistillText()

    @model_validator(mode="after")
    def _cache_of_a_few_tokens(self) -> DistillStage:
        if self.cache is not None and not self.method.cached:
            raise ValueError(f"a cache holds a few tokens at each place, which {self.method.kind} is not content with")
        return self

    @model_validator(mode="after")
    def _some_time(self) -> DistillStage:
        if self.method.own_text and (self.steps is None or self.minutes is not None):
            raise ValueError(
                f"{self.method.kind} needs `steps`, and no `minutes`: how long one takes is not known before"
            )
        if self.minutes is None and self.steps is None:
            object.__setattr__(self, "minutes", DEFAULT_MINUTES)
        return self


Stage = QuantizeStage | PruneStage | DistillStage
_AnyStage = TypeVar("_AnyStage", QuantizeStage, PruneStage)


def _uncorrected(method: MethodConfig) -> MethodConfig:
    """The method, or its rounding, with GPTQ's correction off where it was not set."""
    if isinstance(method, GptqConfig):
        return method if "correction" in method.model_fields_set else method.model_copy(update={"correction": 0.0})
    rounding = getattr(method, "rounding", None)
    if not isinstance(rounding, GptqConfig):
        return method
    return method.model_copy(update={"rounding": _uncorrected(rounding)})


def _with_calibration(stage: _AnyStage, wanted: bool) -> _AnyStage:
    """Fills in the default text where one is `wanted` to learn from. ValueError for one that is not read."""
    if wanted and stage.calibration is None:
        object.__setattr__(stage, "calibration", CalibrationConfig())
    if not wanted and stage.calibration is not None:
        raise ValueError(f"{stage.method.kind} reads no calibration text: remove `calibration`")
    said = stage.calibration or CalibrationConfig()
    if said.experts == "all" and stage.method.kind not in ALL_TOKENS:
        raise ValueError(f"{stage.method.kind} calibrates experts on routed tokens alone: remove `calibration.experts`")
    if said.redrawn and (stage.kind == "prune" or stage.method.kind in CHOOSING):
        raise ValueError(f"{stage.method.kind} reads windows as they are: remove `calibration.redrawn`")
    return stage

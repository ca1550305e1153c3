"""The stage that quantises: a method, the layout of every linear, and the format that is written."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictStr, model_validator

from compress.errors import UserError
from compress.formats.names import FormatName
from compress.formats.names import refusal as not_carried_by
from compress.formats.names import usual as usual_format
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
from compress.stages.shared import switch, with_calibration
from compress.types import Scheme


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
    refine: Annotated[RefineConfig | None, BeforeValidator(switch)] = None
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
        return with_calibration(self, self.reads_text or self.refine is not None)

    @property
    def schemes(self) -> list[Scheme]:
        """The layouts of this stage: its own, and those of its overrides."""
        return [config.to_scheme() for config in (self.scheme, *(each.scheme for each in self.overrides))]

    @property
    def reads_text(self) -> bool:
        """Whether the method, the cache or a layout learns from calibration text, refining aside."""
        return self.method.calibrated or self.kv_cache is not None or any(map(needs_calibration, self.schemes))


def _uncorrected(method: MethodConfig) -> MethodConfig:
    """The method, or its rounding, with GPTQ's correction off where it was not set."""
    if isinstance(method, GptqConfig):
        return method if "correction" in method.model_fields_set else method.model_copy(update={"correction": 0.0})
    rounding = getattr(method, "rounding", None)
    if not isinstance(rounding, GptqConfig):
        return method
    return method.model_copy(update={"rounding": _uncorrected(rounding)})

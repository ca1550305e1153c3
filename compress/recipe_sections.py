"""Parts of a recipe that stages share: the numeric layout and the calibration text."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StrictInt, StrictStr, Tag, field_validator

from compress.calibration.mix import parse_mix
from compress.schemes import FIXED_SCHEMES, NamedScheme
from compress.types import IntScheme, Scheme


class Section(BaseModel):
    """A frozen part that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SchemeConfig(Section):
    """Numeric layout of the weights: bits per code, inputs per scale (or one scale per output channel), symmetry."""

    tag: ClassVar[str] = "integer"

    bits: StrictInt = Field(default=4, ge=2, le=8)
    group_size: int | Literal["channel"] = 128
    symmetric: bool = True

    @field_validator("group_size", mode="plain")
    @classmethod
    def _group_size(cls, value: object) -> int | str:
        if value == "channel" or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
            return value
        raise ValueError("must be a positive integer or `channel`")

    def to_scheme(self) -> IntScheme:
        """The layout as the rest of the library passes it around."""
        return IntScheme(self.bits, None if self.group_size == "channel" else int(self.group_size), self.symmetric)


class FixedSchemeConfig(Section):
    """A layout of weights and inputs that its name says in full, such as `W8A8` or `FP8_DYNAMIC`."""

    tag: ClassVar[str] = "fixed"

    name: StrictStr

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in FIXED_SCHEMES:
            raise ValueError(f"must be one of {', '.join(FIXED_SCHEMES)}")
        return value

    def to_scheme(self) -> Scheme:
        """The layout as the rest of the library passes it around."""
        return FIXED_SCHEMES[self.name]


def scheme_settings(named: NamedScheme) -> dict[str, Any]:
    """What a scheme's name sets in a recipe's `scheme`."""
    if named.fixed is not None:
        return {"name": named.name}
    given = {"bits": named.bits, "group_size": named.group_size, "symmetric": named.symmetric}
    return {key: value for key, value in given.items() if value is not None}


def _tag_of(value: object) -> str:
    named = "name" in value if isinstance(value, dict) else isinstance(value, FixedSchemeConfig)
    return FixedSchemeConfig.tag if named else SchemeConfig.tag


AnyScheme = Annotated[
    Annotated[SchemeConfig, Tag(SchemeConfig.tag)] | Annotated[FixedSchemeConfig, Tag(FixedSchemeConfig.tag)],
    Discriminator(_tag_of),
]


def needs_calibration(scheme: Scheme) -> bool:
    """Whether the layout itself stores something that only calibration text can tell."""
    return scheme.inputs is not None and not scheme.inputs.dynamic


class CalibrationConfig(Section):
    """Which text the method learns from: `samples` windows of `seq_len` tokens of `source`.

    `source` is a packaged text's name, the path of a text, JSONL, JSON or Parquet file, a data set of the hub
    (`org/name`), or a mix of them with the share of each (`tales:0.5,chats.jsonl:0.5`). `experts`: whether those of a
    mixture learn from the tokens that the router sends them or from all; where it sends one less than `starved_share`
    of the tokens, that one learns from all, and a fallback says so. `redrawn`: so many copies of every window are read
    besides, in which the original model has drawn a share of the tokens anew.
    """

    source: StrictStr = Field(default="tales", min_length=1)
    samples: StrictInt = Field(default=128, ge=1)
    seq_len: StrictInt = Field(default=512, ge=2)
    experts: Literal["routed", "all"] = "routed"
    starved_share: float = Field(default=0.005, ge=0.0, lt=1.0)
    redrawn: StrictInt = Field(default=0, ge=0, le=64)
    redrawn_share: float = Field(default=0.3, gt=0.0, lt=1.0)

    @property
    def windows(self) -> int:
        """How many are read, copies among them."""
        return self.samples * (1 + self.redrawn)

    @field_validator("source")
    @classmethod
    def _mix(cls, value: str) -> str:
        parse_mix(value)
        return value

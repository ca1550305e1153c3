"""The recipe: everything that decides the bytes of an artifact, typed, with one canonical form and one hash.

Unknown keys are refused, and all problems of a recipe are reported at once. Where the source model and the calibration
text lie is not part of the hash: both are identified by their own digests, so a moved directory is still the same work.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictInt,
    StrictStr,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from compress.calibration.mix import parse_mix, spell
from compress.distillation.configs import ForwardKlConfig, LossConfig
from compress.errors import UserError
from compress.formats.names import FormatName
from compress.formats.names import refusal as not_carried_by
from compress.pruning.configs import PruningConfig
from compress.quantization.configs import METHODS, MethodConfig, RefineConfig, short_form
from compress.recipe_problems import describe
from compress.recipe_yaml import apply_override, find_recipe, read_yaml
from compress.schemes import FIXED_SCHEMES, NamedScheme, parse_scheme
from compress.types import IntScheme, Scheme, Sparsity

DEFAULT_MINUTES = 8.0
ALL_TOKENS = ("gptq", "awq")
"""Methods that can have experts learn from all tokens."""

HINT = "correct the keys named above; `recipes/` holds a commented recipe per method"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SchemeConfig(_Section):
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


class FixedSchemeConfig(_Section):
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
    return {"bits": named.bits} | ({} if named.symmetric is None else {"symmetric": named.symmetric})


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


class CalibrationConfig(_Section):
    """Which text the method learns from: `samples` windows of `seq_len` tokens of `source`.

    `source` is a packaged text's name, the path of a text, JSONL, JSON or Parquet file, a data set of the hub
    (`org/name`), or a mix of them with the share of each (`tales:0.5,chats.jsonl:0.5`). `experts`: whether those of a
    mixture learn from the tokens that the router sends them or from all; where it sends one less than `starved_share`
    of the tokens, that one learns from all, and a fallback says so.
    """

    source: StrictStr = Field(default="tales", min_length=1)
    samples: StrictInt = Field(default=128, ge=1)
    seq_len: StrictInt = Field(default=512, ge=2)
    experts: Literal["routed", "all"] = "routed"
    starved_share: float = Field(default=0.005, ge=0.0, lt=1.0)

    @field_validator("source")
    @classmethod
    def _mix(cls, value: str) -> str:
        parse_mix(value)
        return value


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


class Override(_Section):
    """Linears, by name or pattern as in `ignore`, that get a scheme of their own; nothing is inherited."""

    linears: list[StrictStr] = Field(min_length=1)
    scheme: Annotated[AnyScheme, BeforeValidator(_spelled_out)]


class QuantizeStage(_Section):
    """One pass of one method over the linears of the decoder blocks, `ignore` apart; later `overrides` win."""

    kind: Literal["quantize"] = "quantize"
    method: Annotated[MethodConfig, BeforeValidator(short_form)]
    scheme: Annotated[AnyScheme, BeforeValidator(_spelled_out)] = SchemeConfig()
    overrides: list[Override] = Field(default_factory=list)
    ignore: list[StrictStr] = Field(default_factory=list)
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
        return data if usual is None else {**data, "scheme": usual}

    @model_validator(mode="after")
    def _parts_go_together(self) -> QuantizeStage:
        for scheme in self.schemes:
            refusal = self.method.refusal(scheme) or (None if self.refine is None else self.refine.refusal(scheme))
            if refusal:
                raise ValueError(refusal)
            if not_carried := not_carried_by(self.format, scheme):
                raise ValueError(f"{not_carried.reason}: {not_carried.hint}")
        if self.format == "gptq" and not all(scheme.symmetric for scheme in self.schemes):
            # Which zero points come out is known too late, when a run of hours has found one.
            raise ValueError("gptq v1 cannot store a zero point of 0, which asymmetric weights may have: use gptq-v2")
        if self.refine is not None and self.format != "compressed-tensors":
            raise ValueError("refine tunes compressed-tensors: leave one of `format` and `refine` out")
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


class PruneStage(_Section):
    """One pass of one pruning method.

    `sparsity`, a share of each linear's weights, or a `pattern` such as 2:4; of a structured method `keep`, the share
    of all parameters that stays. `allocation` shares a sparsity out among the blocks, by their outliers (owl) or their
    spectra (alphapruning), in place of evenly. `format` sparse-bitmask stores one bit for each weight, and those that
    stay: smaller on disk, for our own reader.
    """

    kind: Literal["prune"] = "prune"
    method: Annotated[PruningConfig, BeforeValidator(short_form)]
    sparsity: float | None = Field(default=None, gt=0.0, lt=1.0)
    pattern: StrictStr | None = None
    keep: float | None = Field(default=None, gt=0.0, lt=1.0)
    allocation: Literal["uniform", "owl", "alphapruning"] = "uniform"
    format: Literal["dense", "sparse-bitmask"] = "dense"
    ignore: list[StrictStr] = Field(default_factory=list)
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


class DistillText(_Section):
    """Which text the student learns on: `samples` windows of `seq_len` tokens of `source`, all it has if left out.

    `held_out` of them are only measured on. `source` is as in CalibrationConfig.
    """

    source: StrictStr = Field(default="tales", min_length=1)
    samples: StrictInt | None = Field(default=None, ge=4)
    seq_len: StrictInt = Field(default=256, ge=2)
    held_out: StrictInt = Field(default=16, ge=2)


class DistillStage(_Section):
    """A student learns from a teacher: the source of the stage from the model at `teacher`.

    teacher: left out, the model that a run of several stages begins with, else the packaged model. minutes, or steps:
    how long; a run by minutes measures at its start how many steps they are, and its resolved recipe holds both.
    lora_rank: 0 trains all weights. learning_rate: left out, what suits adapters or all weights. batch_size: windows.
    cache: a directory where what the teacher says is kept, for the loss `topk-kl`.
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
    def _cache_of_top_tokens(self) -> DistillStage:
        if self.cache is not None and self.method.kind != "topk-kl":
            raise ValueError(f"a cache holds the teacher's top tokens, which {self.method.kind} is not content with")
        return self

    @model_validator(mode="after")
    def _some_time(self) -> DistillStage:
        if self.minutes is None and self.steps is None:
            object.__setattr__(self, "minutes", DEFAULT_MINUTES)
        return self


Stage = QuantizeStage | PruneStage | DistillStage
_AnyStage = TypeVar("_AnyStage", QuantizeStage, PruneStage)


def _with_calibration(stage: _AnyStage, wanted: bool) -> _AnyStage:
    """Fills in the default text where one is `wanted` to learn from. ValueError for one that is not read."""
    if wanted and stage.calibration is None:
        object.__setattr__(stage, "calibration", CalibrationConfig())
    if not wanted and stage.calibration is not None:
        raise ValueError(f"{stage.method.kind} reads no calibration text: remove `calibration`")
    said = stage.calibration or CalibrationConfig()
    if said.experts == "all" and stage.method.kind not in ALL_TOKENS:
        raise ValueError(f"{stage.method.kind} calibrates experts on routed tokens alone: remove `calibration.experts`")
    return stage


def _kind_of(stage: object) -> str:
    """A stage without a `kind` quantises."""
    return str(stage.get("kind", "quantize") if isinstance(stage, Mapping) else getattr(stage, "kind", "quantize"))


class Recipe(_Section):
    """A whole run: the source model (may be left to the caller), the seed, and the stages in order."""

    version: Literal[1] = 1
    model: StrictStr | None = None
    seed: StrictInt = Field(default=0, ge=0, lt=2**63)
    stages: list[
        Annotated[
            Annotated[QuantizeStage, Tag("quantize")]
            | Annotated[PruneStage, Tag("prune")]
            | Annotated[DistillStage, Tag("distill")],
            Discriminator(_kind_of),
        ]
    ] = Field(min_length=1)

    def canonical(self) -> str:
        """`placeless` as JSON with sorted keys and no spaces."""
        return json.dumps(self.placeless(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    def placeless(self) -> dict[str, Any]:
        """All that decides the result as plain data, every default written out: no model, calibration by name.

        Of a distillation by minutes, the steps that they were measured to be are left out: the same command, run again
        on a machine that is busy, is still the same work.
        """
        data = self.model_dump(mode="json", exclude={"model"})
        for stage in data["stages"]:
            if not stage.get("overrides", True):  # a recipe of one scheme has the hash that it always had
                del stage["overrides"]
            if stage.get("refine", True) is None:  # and so has one that is not refined
                del stage["refine"]
            stage.pop("teacher", None)
            if "cache" in stage:  # where it lies is nobody's business, that what is read there is rounded is
                stage |= {"cached": True} if stage.pop("cache") is not None else {}
            if stage.get("minutes") is not None:
                del stage["steps"]
            if stage.get("format") == "compressed-tensors":
                del stage["format"]
            if stage["calibration"] is not None:
                stage["calibration"]["source"] = spell(parse_mix(stage["calibration"]["source"]), placeless=True)
        return data

    def hash(self) -> str:
        """sha256 of the canonical form, in hexadecimal."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()

    def to_yaml(self) -> str:
        """The resolved recipe as YAML, in the order of the definitions above; `load_recipe` reads it back equal."""
        data = self.model_dump(mode="json")
        for stage in data["stages"]:
            for key in (
                "sparsity",
                "pattern",
                "keep",
                "teacher",
                "cache",
                "minutes",
                "steps",
                "learning_rate",
                "calibration",
                "overrides",
                "refine",
                "kv_cache",
            ):
                if key in stage and stage[key] in (None, []):
                    del stage[key]
        if data["model"] is None:
            del data["model"]
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000)


def parse_recipe(data: Mapping[str, Any], name: str = "the recipe", root: str = "", hint: str = HINT) -> Recipe:
    """Checks plain data (as read from YAML) into a Recipe. Problems are named by their path, `root` taken off it.

    Raises:
        UserError: with every problem of the data in one message, each with its dotted path and the nearest valid name.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        problems = [problem.removeprefix(root) for problem in describe(error, Recipe)]
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{name} has {count}: " + "; ".join(problems), hint) from None


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, a file or a shipped one by its bare name, applies `key=value` overrides (dotted keys, values
    in YAML), and checks the result.

    Raises:
        UserError: the file is missing, not UTF-8, not YAML or not a mapping; an override does not fit; or any problem
            that `parse_recipe` reports.
    """
    data = read_yaml(find_recipe(path))
    for override in overrides:
        apply_override(data, override)
    return parse_recipe(data, f"recipe {path}")

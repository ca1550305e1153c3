"""A gate policy: which losses are acceptable, as TOML. Unknown keys are refused, so no typing error loosens a gate."""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from compress import content
from compress.errors import UserError
from compress.evaluation.gating.kinds import (
    AccuracyPaired,
    BitsPerWeightMax,
    BytesMax,
    Degenerate,
    DpRms,
    DpTail,
    Gate,
    GateSpec,
    GenerationIdentical,
    KlIncrease,
    KlMean,
    KlP999,
    LoadTime,
    NoDenseFallback,
    PeakMemoryRatio,
    PplRatio,
    Role,
    Section,
    SizeRatio,
    SpeedRatio,
    TextGate,
    Top1Agreement,
)
from compress.evaluation.gating.profiles import Profile, select
from compress.evaluation.gating.waivers import Waiver
from compress.recipe_problems import describe

__all__ = [
    "AccuracyPaired",
    "BitsPerWeightMax",
    "BytesMax",
    "Degenerate",
    "DpRms",
    "DpTail",
    "Gate",
    "GateSpec",
    "GenerationIdentical",
    "KlIncrease",
    "KlMean",
    "KlP999",
    "LoadTime",
    "NoDenseFallback",
    "PeakMemoryRatio",
    "Policy",
    "PplRatio",
    "Profile",
    "Role",
    "SizeRatio",
    "SpeedRatio",
    "Top1Agreement",
    "Waiver",
    "default_policy",
    "load_policy",
    "packaged_policies",
]


class Policy(Section):
    """The whole file. `alpha`: the risk, per gate, of passing a model that lies exactly on the limit.

    `suite`, or `data` (a packaged text's name or a path) with `max_tokens` and `seq_len`, says what to score on when a
    model has not been scored; scores made on anything else, or in other windows, are refused, because limits hold for
    what they were measured on. `seq_len` is tokens per window: 512, or the model's context where that is shorter, if it
    is left out.

    `on_inconclusive`: what the data cannot decide counts as a failure, as a pass with a warning, or as what it is;
    `extend` scores more, in at most `looks` equal steps up to all there is, and spends alpha over the looks. A primary
    gate that was not measured never passes, with `warn` neither.
    `secondary`: whether a secondary gate that is significantly beyond its limit (Holm over all of them) only warns.
    `allow_identical`: for candidates that are meant to compute exactly what the baseline does, such as another format.
    `seed` is that of the BCa bootstrap.
    """

    version: Literal[1]
    name: str = "policy"
    alpha: float = Field(default=0.05, gt=0.0, lt=0.5)
    seed: int = Field(default=0, ge=0)
    on_inconclusive: Literal["fail", "warn", "inconclusive", "extend"] = "inconclusive"
    looks: int = Field(default=3, ge=2, le=10)
    secondary: Literal["warn", "block"] = "warn"
    allow_identical: bool = False
    suite: str | None = None
    data: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    seq_len: int | None = Field(default=None, ge=2)
    gate: list[GateSpec] = Field(min_length=1)
    profile: dict[str, Profile] = Field(default_factory=dict)
    waiver: list[Waiver] = Field(default_factory=list)

    @model_validator(mode="after")
    def _can_refuse(self) -> Policy:
        ids = [gate.id for gate in self.gate]
        if twice := sorted({name for name in ids if ids.count(name) > 1}):
            raise ValueError(f"the gate id `{twice[0]}` occurs twice")
        if "schemes" in ids:
            raise ValueError("`schemes` cannot be a gate's id: profiles use that word")
        if all(gate.role == "secondary" for gate in self.gate):
            raise ValueError("no gate is primary, so nothing could fail")
        if self.suite is not None and any(each is not None for each in (self.data, self.max_tokens, self.seq_len)):
            raise ValueError(
                "`suite` says what to score on, so `data`, `max_tokens` and `seq_len` have no place beside it"
            )
        waived = [waiver.gate for waiver in self.waiver]
        for name in waived:
            if name not in ids:
                raise ValueError(f"a waiver names the gate `{name}`, which the policy does not hold")
            if waived.count(name) > 1:
                raise ValueError(f"the gate `{name}` has two waivers")
        for name, profile in self.profile.items():
            try:
                profile.apply(self.gate)
            except ValueError as error:
                raise ValueError(f"profile `{name}`: {error}") from None
        return self

    def for_scheme(self, scheme: str) -> tuple[str | None, list[Gate]]:
        """The profile's name and the gates with its limits; None and the gates as they stand where none fits."""
        name = select(self.profile, scheme)
        return name, list(self.gate) if name is None else self.profile[name].apply(self.gate)

    def texts(self) -> set[str]:
        """Names of the texts that gates name themselves."""
        return {gate.text for gate in self.gate if isinstance(gate, TextGate) and gate.text is not None}

    def tasks(self) -> list[AccuracyPaired]:
        """The gates on tasks."""
        return [gate for gate in self.gate if isinstance(gate, AccuracyPaired)]

    def sha256(self) -> str:
        """Hash of what the policy says; comments and spelling do not count."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def packaged_policies() -> dict[str, Path]:
    """The policies that ship with the package, by name."""
    directory = Path(str(content.eval_dir().joinpath("gates")))
    return {path.stem: path for path in sorted(directory.glob("*.toml"))}


def default_policy() -> Path:
    """The policy that is used where none is given."""
    return packaged_policies()["default"]


def load_policy(path: str | Path) -> Policy:
    """Reads a policy file, or a packaged policy by name.

    Raises UserError for a missing file, bad TOML, an unknown key, or a value out of range.
    """
    hint = f"see {default_policy().name} in eval/gates for a commented example"
    packaged = packaged_policies()
    file = packaged[str(path)] if str(path) in packaged and not Path(path).exists() else Path(path)
    try:
        values: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read the policy {path}: {error.strerror}", f"packaged: {', '.join(packaged)}; {hint}"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"the policy {path} is not TOML: {error}", hint) from error
    try:
        return Policy.model_validate(values)
    except ValidationError as error:
        raise UserError(f"policy {path}: {'; '.join(describe(error, Policy))}", hint) from None

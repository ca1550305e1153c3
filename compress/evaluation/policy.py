"""A gate policy: which losses are acceptable, as TOML. Unknown keys are refused: a typing error never loosens a gate.

A new kind of gate is one class here, one entry in `GateSpec`, and one measure in `measures.py`.
"""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compress import content
from compress.errors import UserError
from compress.recipe_problems import describe

Role = Literal["primary", "secondary"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _Gate(_Section):
    """`id` names the gate in reports. A `primary` gate decides; a `secondary` one is shown and warned about."""

    id: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    role: Role = "primary"


class SizeRatio(_Gate):
    """Weight files of the baseline must be at least `min` times as large as the candidate's."""

    kind: Literal["size_ratio"]
    min: float = Field(gt=0.0)


class PplRatio(_Gate):
    """Perplexity may rise by at most this share: 0.04 allows 4%."""

    kind: Literal["ppl_ratio"]
    max_increase: float = Field(gt=-1.0)


class KlMean(_Gate):
    """Mean KL(baseline || candidate) per token, in nats, may be at most `max`."""

    kind: Literal["kl_mean"]
    max: float = Field(gt=0.0)


class Top1Agreement(_Gate):
    """The likeliest token must be the baseline's for at least this share of the tokens."""

    kind: Literal["top1_agreement"]
    min: Fraction


class KlP999(_Gate):
    """At most one token in a thousand may have a KL above `max` nats: mean KL hides rare disasters."""

    kind: Literal["kl_p999"]
    max: float = Field(gt=0.0)


GateSpec = Annotated[SizeRatio | PplRatio | KlMean | Top1Agreement | KlP999, Field(discriminator="kind")]


class Policy(_Section):
    """The whole file. `alpha`: the risk, per gate, of passing a model that lies exactly on the limit.

    `data` (a packaged text's name or a path) and `max_tokens` say what to score on when a model has not been scored; a
    record of another text is refused if `data` is given, because limits hold for the text they were measured on.
    `on_inconclusive`: what the data cannot decide counts as a failure, as a pass with a warning, or as what it is.
    """

    version: Literal[1]
    name: str = "policy"
    alpha: float = Field(default=0.05, gt=0.0, lt=0.5)
    on_inconclusive: Literal["fail", "warn", "inconclusive"] = "inconclusive"
    data: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    gate: list[GateSpec] = Field(min_length=1)

    @model_validator(mode="after")
    def _can_refuse(self) -> Policy:
        ids = [gate.id for gate in self.gate]
        if twice := sorted({name for name in ids if ids.count(name) > 1}):
            raise ValueError(f"the gate id `{twice[0]}` occurs twice")
        if all(gate.role == "secondary" for gate in self.gate):
            raise ValueError("no gate is primary, so nothing could fail")
        return self

    def sha256(self) -> str:
        """Hash of what the policy says; comments and spelling do not count."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def default_policy() -> Path:
    """The policy that ships with the package."""
    return Path(str(content.eval_dir().joinpath("gates", "default.toml")))


def load_policy(path: str | Path) -> Policy:
    """Reads a policy; raises UserError for a missing file, bad TOML, an unknown key, or a value out of range."""
    hint = f"see {default_policy().name} in eval/gates for a commented example"
    try:
        values: dict[str, Any] = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the policy {path}: {error.strerror}", hint) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"the policy {path} is not TOML: {error}", hint) from error
    try:
        return Policy.model_validate(values)
    except ValidationError as error:
        raise UserError(f"policy {path}: {'; '.join(describe(error, Policy))}", hint) from None

"""The recipe: everything that decides the bytes of an artifact, typed, with one canonical form and one hash.

Unknown keys are refused, and all problems of a recipe are reported at once. Where the source model and the calibration
text lie is not part of the hash: both are identified by their own digests, so a moved directory is still the same work.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Discriminator, Field, StrictInt, StrictStr, Tag, ValidationError, model_validator

from compress.calibration.mix import parse_mix, spell
from compress.errors import UserError
from compress.recipe_checks import Placed, as_written, put_back, taken_out
from compress.recipe_problems import describe
from compress.recipe_sections import Section
from compress.recipe_yaml import apply_override, find_recipe, read_yaml
from compress.stages import DistillStage, PruneStage, QuantizeStage

HINT = "correct the keys named above; `recipes/` holds a commented recipe per method"


def _kind_of(stage: object) -> str:
    """A stage without a `kind` quantises."""
    return str(stage.get("kind", "quantize") if isinstance(stage, Mapping) else getattr(stage, "kind", "quantize"))


class Recipe(Section):
    """A whole run: the source model (may be left to the caller), the seed, and the stages in order.

    checks: the scores and gates that stood among the stages; they decide whether a run goes on, not what it makes.
    Dumps leave them out, because `parse_recipe` finds them among the stages.
    """

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
    checks: list[Placed] = Field(default_factory=list, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _checks_apart(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or not isinstance(data.get("stages"), list):
            return data
        if "checks" in data:
            raise ValueError("`checks` is no key of a recipe: write `kind: gate` and `kind: eval` among the stages")
        stages, checks = taken_out(data["stages"])
        if checks and checks[0]["after"] == 0 and stages:
            raise ValueError("stages.0 checks an artifact, and no stage before it makes one: put a stage first")
        return {**data, "stages": stages, "checks": checks} if checks else data

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
            for table in ("embeddings", "head"):
                if stage.get(table, True) is None:
                    del stage[table]
            stage.pop("teacher", None)
            stage.pop("stats", None)  # what is read there is what would be measured
            if "cache" in stage:  # where it lies is nobody's business, that what is read there is rounded is
                stage |= {"cached": True} if stage.pop("cache") is not None else {}
            if stage.get("minutes") is not None:
                del stage["steps"]
            if stage.get("format") == "compressed-tensors":
                del stage["format"]
            if (stage["calibration"] or {}).get("answers", True) is None:
                del stage["calibration"]["answers"]
            _without_copies(stage["calibration"])
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
                "embeddings",
                "head",
            ):
                if key in stage and stage[key] in (None, []):
                    del stage[key]
            if (stage.get("calibration") or {}).get("answers", True) is None:
                del stage["calibration"]["answers"]
            _without_copies(stage.get("calibration"))
        if data["model"] is None:
            del data["model"]
        data["stages"] = put_back(data["stages"], self.checks)
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000)


def _without_copies(calibration: dict[str, Any] | None) -> None:
    """Leaves out what is drawn anew where nothing is, so that such a recipe has the hash that it always had."""
    if calibration is not None and not calibration.get("redrawn", 1):
        del calibration["redrawn"], calibration["redrawn_share"]


def parse_recipe(data: Mapping[str, Any], name: str = "the recipe", root: str = "", hint: str = HINT) -> Recipe:
    """Checks plain data (as read from YAML) into a Recipe. Problems are named by their path, `root` taken off it.

    Raises:
        UserError: with every problem of the data in one message, each with its dotted path and the nearest valid name.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        found = [as_written(problem, data.get("stages")) for problem in describe(error, Recipe)]
        problems = [problem.removeprefix(root) for problem in found]
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

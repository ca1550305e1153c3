"""What a recipe checks between its stages: scores, gates, drafts. No byte of an artifact depends on them.

In a recipe they stand in `stages`, behind the stage whose artifact they are about; here they are taken out of that
list, so that stages are what makes something.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, StrictInt, StrictStr

from compress.recipe_sections import Section


class EvalCheck(Section):
    """The artifact so far is scored by a suite against the model that the run begins with, and keeps the scores.

    max_tokens: of each text, in place of the suite's.
    """

    kind: Literal["eval"] = "eval"
    suite: StrictStr = Field(default="smoke", min_length=1)
    max_tokens: StrictInt | None = Field(default=None, ge=1)


class GateCheck(Section):
    """The artifact so far has to pass a policy, a file or a packaged one by name; if it does not, the run ends there.

    It is compared with the model that the run begins with.
    """

    kind: Literal["gate"] = "gate"
    policy: StrictStr = Field(default="default", min_length=1)


class DraftCheck(Section):
    """The artifact so far drafts for `target`, by default the model that the run begins with, on held-out prompts.

    What share of `tokens` proposed at a time is accepted goes on its card; the run goes on whatever it is. prompts: at
    most so many of those that ship. new_tokens: of each answer.
    """

    kind: Literal["draft"] = "draft"
    target: StrictStr | None = Field(default=None, min_length=1)
    tokens: StrictInt = Field(default=4, ge=1)
    prompts: StrictInt = Field(default=16, ge=1)
    new_tokens: StrictInt = Field(default=48, ge=2)


Check = EvalCheck | GateCheck | DraftCheck
KINDS = ("eval", "gate", "draft")


class Placed(Section):
    """A check, its number in the recipe's own list, and how many stages that make something stand before it."""

    check: Check = Field(discriminator="kind")
    at: int
    after: int


def taken_out(stages: list[Any]) -> tuple[list[Any], list[dict[str, Any]]]:
    """The stages that make something, and the checks among them as plain data for `Placed`."""
    makers: list[Any] = []
    checks: list[dict[str, Any]] = []
    for at, stage in enumerate(stages):
        if isinstance(stage, Mapping) and stage.get("kind") in KINDS:
            checks.append({"check": dict(stage), "at": at, "after": len(makers)})
        else:
            makers.append(stage)
    return makers, checks


def put_back(makers: list[Any], checks: list[Placed]) -> list[Any]:
    """The list as a recipe has it: plain stages with the checks among them."""
    whole = list(makers)
    for placed in checks:
        whole.insert(placed.at, placed.check.model_dump(mode="json", exclude_none=True))
    return whole


_PLACE = re.compile(r"^(stages|checks)\.(\d+)(?:\.check)?(?:\.(?:eval|gate|draft)(?=\.|:))?")


def as_written(problem: str, stages: Any) -> str:
    """A problem with its path as the recipe has it, where checks and stages are one list."""
    found = _PLACE.match(problem)
    if found is None or not isinstance(stages, list):
        return problem
    makers = [at for at, stage in enumerate(stages) if not (isinstance(stage, Mapping) and stage.get("kind") in KINDS)]
    others = [at for at in range(len(stages)) if at not in makers]
    places, number = makers if found[1] == "stages" else others, int(found[2])
    if number >= len(places):
        return problem
    rest = problem[found.end() :] if found[1] == "checks" else problem[len(f"stages.{found[2]}") :]
    return f"stages.{places[number]}{rest}"

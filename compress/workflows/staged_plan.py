"""The plan of a run of several stages: each is planned on the outline of what the one before it will make."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from compress import content
from compress.pipeline.work import Whole
from compress.recipe import Recipe
from compress.recipe_checks import Check, GateCheck
from compress.stages import DistillStage, PruneStage, Stage
from compress.workflows.checks import refuse_unknown
from compress.workflows.stages import alone_of, checks_behind, folder_of, place_of, refuse_order

if TYPE_CHECKING:
    from compress.pipeline import AnyPlan


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage: its plan, None where what it works on is not known before the run; and the checks behind it.

    `unknown`: what only the run will tell, in words.
    """

    number: int
    stage: Stage
    plan: AnyPlan | None
    unknown: tuple[str, ...]
    checks: tuple[Check, ...]


def plan(
    recipe: Recipe, *, model: str | Path | None, output: str | Path | None, device: str, restart: bool, scored: bool
) -> list[StagePlan]:
    """The plans of all stages in order, as `pipeline.plan` makes them. Nothing is written but into a temporary place.

    A stage that has a problem, or whose result has no outline, is the last that has a plan.

    Raises:
        UserError, IntegrityError: as `pipeline.plan`; stages in an order that cannot be; no such suite or policy.
    """
    from compress import pipeline
    from compress.models.hub import local_directory
    from compress.pipeline.outline import outline
    from compress.pipeline.resolve import anchored, resolve

    refuse_order(recipe)
    refuse_unknown([placed.check for placed in recipe.checks])
    source = model or recipe.model or content.default_model()
    root = local_directory(source)
    several = len(recipe.stages) > 1
    whole = Whole(anchored(recipe, source).model_copy(update={"checks": []}), root.resolve().name) if several else None
    found: list[StagePlan] = []
    before: Path | None = root
    with tempfile.TemporaryDirectory(prefix="compress-plan-") as held:
        for number, stage in enumerate(recipe.stages, start=1):
            alone, last = alone_of(recipe, stage, root), number == len(recipe.stages)
            checks = tuple(checks_behind(recipe, number))
            if before is None:
                found.append(StagePlan(number, stage, None, _unknown(stage, checks), checks))
                continue
            place = output if last or whole is None else place_of(folder_of(whole, output), number, alone)
            made = pipeline.plan(
                alone,
                model=before,
                output=place,
                device=device,
                restart=restart,
                scored=last and (scored or bool(checks)),
                whole=whole if last else None,
            )
            if number > 1:
                made = replace(made, model=f"what stage {number - 1} makes")
            found.append(StagePlan(number, stage, made, _unknown(stage, checks), checks))
            if last or made.problems:
                before = None
                continue
            outlined = Path(held) / str(number)
            job = resolve(alone, model=before, output=place, device=device)
            before = outlined if outline(job, made, outlined) else None
    return found


def _unknown(stage: Stage, checks: tuple[Check, ...]) -> tuple[str, ...]:
    """What no plan can tell of a stage."""
    said = ["what it loses"]
    if isinstance(stage, PruneStage) and stage.method.structured:
        said.insert(0, "which parts go")
    if isinstance(stage, DistillStage):
        said = ["what it wins back"]
        if stage.steps is None:
            said.insert(0, f"how many steps {stage.minutes:g} minutes are")
    gates = [f"what the gate {check.policy} says" for check in checks if isinstance(check, GateCheck)]
    return (*said, *gates)

"""A recipe of several stages: each stage's artifact is the source of the next, and the last one tells of all.

Stages before the last are kept as artifacts of their own beside the output, each in a directory that is called after
its number, method and settings. A run that was killed goes on in the stage where it was; a recipe whose last stages
were changed does only those again. Checks are done on the artifact that they stand behind; a gate that it does not pass
ends the run, and that artifact stays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from compress import content
from compress.artifact import store
from compress.artifact.output import refuse_itself
from compress.artifact.summary import recipe_summary
from compress.errors import UserError
from compress.pipeline.work import Whole
from compress.recipe import Recipe
from compress.recipe_checks import Check, DraftCheck
from compress.stages import DistillStage, QuantizeStage, Stage
from compress.workflows.checks import carry_out, refuse_unknown

if TYPE_CHECKING:
    from compress.evaluation.verdict import Verdict
    from compress.pipeline import RunResult
    from compress.progress import Progress

FOLDER = "stages"


@dataclass(frozen=True, slots=True)
class StagesResult:
    """The last artifact that was made, and the verdicts of the gates up to there, in order.

    `stopped`: the number of the stage, from 1 on, behind which a gate ended the run; None where all were done.
    `checked`: whether the artifact was checked, which takes the place of the scoring that ends a run.
    """

    run: RunResult
    verdicts: tuple[Verdict, ...]
    stopped: int | None
    checked: bool


def refuse_order(recipe: Recipe) -> None:
    """Raises UserError where a stage would prune or quantise what an earlier one has quantised."""
    for number, stage in enumerate(recipe.stages[:-1]):
        after = recipe.stages[number + 1 :]
        if isinstance(stage, QuantizeStage) and not all(isinstance(later, DistillStage) for later in after):
            raise UserError(
                f"stage {number} of the recipe quantises, and a stage after it does not distil: codes can be neither "
                "pruned nor quantised again",
                "quantise in the last stage, or before stages that distil",
            )


def run(
    recipe: Recipe,
    *,
    model: str | Path | None,
    output: str | Path | None,
    device: str,
    restart: bool,
    scored: bool,
    progress: Progress | None,
    folder: Path | None = None,
) -> StagesResult:
    """Carries out all stages and checks; arguments and errors are those of `pipeline.run` and `checks.carry_out`.

    A distillation without a teacher learns from the model that the run begins with. folder: where the stages before the
    last lie, in place of the usual; those that are there are taken, even with `restart`.
    """
    from compress.models.hub import local_directory
    from compress.pipeline.resolve import anchored
    from compress.workflows import answers

    refuse_order(recipe)
    refuse_unknown([placed.check for placed in recipe.checks])
    if len(recipe.stages) == 1:
        return _single(recipe, model, output, device, restart, scored, progress)
    source = model or recipe.model or content.default_model()
    root = local_directory(source)
    refuse_itself(root, output)
    whole = Whole(anchored(recipe, source).model_copy(update={"checks": []}), root.resolve().name)
    earlier = folder or folder_of(whole, output)
    before: Path = root
    verdicts: tuple[Verdict, ...] = ()
    last = len(recipe.stages)
    if not place_of(earlier, 1, alone_of(recipe, recipe.stages[0], root)).exists():
        refuse_problems(recipe, root, device)
    for number, stage in enumerate(recipe.stages, start=1):
        alone, wanted = alone_of(recipe, stage, root), checks_behind(recipe, number)
        if number < last:
            place = place_of(earlier, number, alone)
            anew = restart and folder is None
            run = answers.run(alone, model=before, output=place, device=device, restart=anew, progress=progress)
        else:
            run = answers.run(
                alone,
                model=before,
                output=output,
                device=device,
                restart=restart,
                scored=scored or bool(wanted),
                progress=progress,
                whole=whole,
            )
        checked = carry_out(wanted, run.artifact, root, device=device, progress=progress)
        run, verdicts = replace(run, artifact=checked.artifact), (*verdicts, *checked.verdicts)
        if not checked.passed:
            return StagesResult(run, verdicts, number, checked=True)
        before, whole = run.artifact.path, _with_steps(whole, number - 1, run)
    return StagesResult(run, verdicts, None, checked=_scoring(wanted))


def refuse_problems(recipe: Recipe, root: Path, device: str, candidate: str | None = None) -> None:
    """Raises UserError where a plan knows before the first stage that one of them cannot work on what it will get.

    candidate: its name in a search.
    """
    from compress.workflows import staged_plan

    planned = staged_plan.plan(recipe, model=root, output=None, device=device, restart=False, scored=False)
    for stage in planned:
        if stage.plan is not None and stage.plan.problems:
            where = "" if candidate is None else f"candidate {candidate}, "
            said = f"{where}stage {stage.number} ({stage.stage.kind}): {stage.plan.problems[0]}"
            raise UserError(said, stage.plan.hint)


def make_all(
    recipe: Recipe, *, root: Path, folder: Path, device: str, restart: bool, progress: Progress | None
) -> RunResult:
    """Makes all stages as if others followed: each artifact lies in `folder`, where `run` finds it. Gives the last."""
    from compress.workflows import answers

    refuse_order(recipe)
    before = root
    for number, stage in enumerate(recipe.stages, start=1):
        alone = stage_alone(recipe, stage, root)
        place = place_of(folder, number, alone)
        done = answers.run(alone, model=before, output=place, device=device, restart=restart, progress=progress)
        before = done.artifact.path
    return done


def _single(
    recipe: Recipe,
    model: str | Path | None,
    output: str | Path | None,
    device: str,
    restart: bool,
    scored: bool,
    progress: Progress | None,
) -> StagesResult:
    """A recipe of one stage and the checks behind it: of a student, against its teacher."""
    from compress.models.hub import local_directory
    from compress.workflows import answers

    wanted = checks_behind(recipe, 1)
    alone = recipe.model_copy(update={"checks": []})
    run = answers.run(
        alone,
        model=model,
        output=output,
        device=device,
        restart=restart,
        scored=scored or bool(wanted),
        progress=progress,
    )
    if not wanted:
        return StagesResult(run, (), None, checked=False)
    root = local_directory(teacher_of(recipe) or model or recipe.model or content.default_model())
    checked = carry_out(wanted, run.artifact, root, device=device, progress=progress)
    stopped = None if checked.passed else 1
    done = _scoring(wanted)
    return StagesResult(replace(run, artifact=checked.artifact), checked.verdicts, stopped, checked=done)


def teacher_of(recipe: Recipe) -> str | Path | None:
    """What a student is scored against; None for what is scored against its source."""
    *earlier, last = recipe.stages
    return (last.teacher or content.default_model()) if isinstance(last, DistillStage) and not earlier else None


def checks_behind(recipe: Recipe, number: int) -> list[Check]:
    """The checks that stand behind a stage, by its number from 1 on."""
    return [placed.check for placed in recipe.checks if placed.after == number]


def _scoring(checks: list[Check]) -> bool:
    """Whether one of them takes the place of the scoring that ends a run."""
    return not all(isinstance(check, DraftCheck) for check in checks)


def place_of(folder: Path, number: int, alone: Recipe) -> Path:
    """Where the artifact of a stage before the last goes."""
    return folder / f"{number}-{alone.stages[0].method.kind}-{alone.hash()[:8]}"


def alone_of(recipe: Recipe, stage: Stage, root: Path) -> Recipe:
    """One stage as a recipe; the model is left to the caller."""
    if len(recipe.stages) > 1:
        return stage_alone(recipe, stage, root)
    return recipe.model_copy(update={"model": None, "checks": []})


def stage_alone(recipe: Recipe, stage: Stage, root: Path) -> Recipe:
    """One stage of several as a recipe; a student without a teacher learns from the model that all begins with."""
    if isinstance(stage, DistillStage) and stage.teacher is None:
        stage = stage.model_copy(update={"teacher": str(root)})
    return recipe.model_copy(update={"model": None, "stages": [stage], "checks": []})


def folder_of(whole: Whole, output: str | Path | None) -> Path:
    """Where the stages before the last go."""
    if output is not None:
        path = Path(output)
        return path.with_name(f"{path.name}.{FOLDER}")
    summary = recipe_summary(whole.recipe.placeless())
    return store.family_directory(whole.model_name, summary.method, summary.scheme) / FOLDER


def _with_steps(whole: Whole, place: int, done: RunResult) -> Whole:
    """The recipe of the whole with the steps that the minutes of a distillation were."""
    learned = done.artifact.training()
    if learned is None:
        return whole
    stages = list(whole.recipe.stages)
    stages[place] = stages[place].model_copy(update={"steps": learned["steps"]})
    return replace(whole, recipe=whole.recipe.model_copy(update={"stages": stages}))

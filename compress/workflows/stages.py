"""A recipe of several stages: each stage's artifact is the source of the next, and the last one tells of all.

Stages before the last are kept as artifacts of their own beside the output, each in a directory that is called after
its number, method and settings. A run that was killed goes on in the stage where it was; a recipe whose last stages
were changed does only those again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from compress import content
from compress.artifact import store
from compress.artifact.summary import recipe_summary
from compress.errors import UserError
from compress.pipeline.work import Whole
from compress.recipe import Recipe
from compress.recipe_stages import DistillStage, QuantizeStage, Stage

if TYPE_CHECKING:
    from compress.pipeline import RunResult
    from compress.progress import Progress

FOLDER = "stages"


def refuse_order(recipe: Recipe) -> None:
    """Raises UserError where a stage would work on what an earlier one has quantised."""
    for number, stage in enumerate(recipe.stages[:-1]):
        if isinstance(stage, QuantizeStage):
            raise UserError(
                f"stage {number} of the recipe quantises, and stage {number + 1} comes after it: codes can be neither "
                "pruned nor trained nor quantised again",
                "quantise in the last stage",
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
) -> RunResult:
    """Carries out all stages; arguments and errors are those of `pipeline.run`.

    A distillation without a teacher learns from the model that the run begins with.
    """
    from compress.models.hub import local_directory
    from compress.pipeline.resolve import anchored
    from compress.workflows import answers

    refuse_order(recipe)
    source = model or recipe.model or content.default_model()
    root = local_directory(source)
    whole = Whole(anchored(recipe, source), root.resolve().name)
    folder = _folder(whole, output)
    before: Path = root
    for number, stage in enumerate(recipe.stages[:-1], start=1):
        alone = _alone(recipe, stage, root)
        place = folder / f"{number}-{stage.method.kind}-{alone.hash()[:8]}"
        done = answers.run(alone, model=before, output=place, device=device, restart=restart, progress=progress)
        before, whole = done.artifact.path, _with_steps(whole, number - 1, done)
    last = _alone(recipe, recipe.stages[-1], root)
    return answers.run(
        last,
        model=before,
        output=output,
        device=device,
        restart=restart,
        scored=scored,
        progress=progress,
        whole=whole,
    )


def _alone(recipe: Recipe, stage: Stage, root: Path) -> Recipe:
    """One stage as a recipe; the model is left to the caller."""
    if isinstance(stage, DistillStage) and stage.teacher is None:
        stage = stage.model_copy(update={"teacher": str(root)})
    return recipe.model_copy(update={"model": None, "stages": [stage]})


def _folder(whole: Whole, output: str | Path | None) -> Path:
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

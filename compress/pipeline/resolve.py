"""From a recipe to the work of its stage: opens the source and lays out what is to be done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from compress import content
from compress.artifact.output import refuse_itself
from compress.artifact.verify import verify
from compress.calibration.mix import Part, packaged, parse_mix, spell
from compress.distillation import processes
from compress.distillation.configs import OnPolicyConfig
from compress.errors import IntegrityError, UserError
from compress.models.checkpoint import Checkpoint
from compress.models.hub import local_directory
from compress.models.skeleton import Skeleton
from compress.models.tables import tables
from compress.pipeline import (
    depth_job,
    distill_job,
    experts_job,
    job,
    on_policy,
    packed_student,
    prune_job,
    rotated,
    width_job,
)
from compress.pipeline.depth_job import DepthJob
from compress.pipeline.distill_job import DistillJob
from compress.pipeline.experts_job import ExpertsJob
from compress.pipeline.job import Job
from compress.pipeline.output import high_precision
from compress.pipeline.prune_job import PruneJob
from compress.pipeline.width_job import WidthJob
from compress.pipeline.work import Problem, Whole, Work, compute_dtype
from compress.pruning.configs import DepthConfig, ExpertsConfig, WidthConfig
from compress.quantization.configs import HadamardConfig
from compress.recipe import Recipe
from compress.stages import DistillStage, PruneStage, Stage

STRUCTURED: dict[
    type[BaseModel], tuple[Callable[..., Work], Callable[[PruneStage, Skeleton], tuple[Any, list[Problem]]]]
] = {
    WidthConfig: (WidthJob, width_job.assign),
    DepthConfig: (DepthJob, depth_job.assign),
    ExpertsConfig: (ExpertsJob, experts_job.assign),
}
"""By method: the work of a cut, and what lays it out."""


def resolve(
    recipe: Recipe,
    *,
    model: str | Path | None,
    output: str | Path | None,
    device: str,
    whole: Whole | None = None,
    answers: Path | None = None,
) -> Work:
    """Opens the source and lays out the work.

    Raises:
        UserError: no such model, an unsupported or already quantised one, an unusable device; or several of this
            program were started at once.
        IntegrityError: damaged weights, also those of an artifact whose hashes do not match.
    """
    processes.refuse_launched()
    if device not in ("auto", "cpu"):
        raise UserError(
            f"the block loop runs on the CPU; --device {device} cannot be used here", "use --device auto or cpu"
        )
    if len(recipe.stages) != 1:
        raise UserError(
            f"the recipe has {len(recipe.stages)} stages, of which each works on the artifact of the one before",
            "use `compress run`, which does them one after the other",
        )
    source = model or recipe.model or content.default_model()
    checkpoint = Checkpoint.open(local_directory(source))
    refuse_itself(checkpoint.path, output)
    if checkpoint.is_artifact:
        _refuse_damaged(checkpoint)
    if isinstance(recipe.stages[0], DistillStage):
        checkpoint = packed_student.opened(checkpoint)
    skeleton = Skeleton(checkpoint, compute_dtype(checkpoint))
    recipe = anchored(recipe, source)
    (stage,) = recipe.stages
    shared: dict[str, Any] = {
        "recipe": recipe,
        "checkpoint": checkpoint,
        "skeleton": skeleton,
        "output": None if output is None else Path(output),
        "whole": whole,
    }
    if isinstance(stage, PruneStage) and stage.method.structured:
        work, assign = STRUCTURED[type(stage.method)]
        cut, problems = assign(stage, skeleton)
        return work(stage=stage, cut=cut, reasons={}, problems=problems, **shared)
    if isinstance(stage, PruneStage):
        sparsities, reasons, problems = prune_job.assign(stage, skeleton)
        return PruneJob(stage=stage, sparsities=sparsities, reasons=reasons, problems=problems, **shared)
    if isinstance(stage, DistillStage):
        teacher, problems = distill_job.assign(stage, checkpoint, skeleton, stage.teacher)
        if teacher.is_artifact:
            _refuse_damaged(teacher)
        if isinstance(stage.method, OnPolicyConfig):
            problems += on_policy.problems(stage.method, checkpoint, skeleton, teacher)
        return DistillJob(stage=stage, teacher=teacher, reasons={}, problems=problems, answers=answers, **shared)
    schemes, reasons, problems = job.assign(stage, skeleton)
    if isinstance(stage.method, HadamardConfig):
        problems = problems or rotated.problems(stage.method, skeleton)
    if isinstance(stage.method, HadamardConfig) and not problems:
        exact = [spec.weight for spec in (*skeleton.linears(), *tables(skeleton)) if spec.name in schemes]
        view = rotated.rotated(stage.method, skeleton, recipe.seed, exact)
        shared |= {"checkpoint": view, "skeleton": Skeleton(view, skeleton.dtype)}
    made = Job(stage=stage, schemes=schemes, reasons=reasons, problems=problems, **shared)
    if not problems and (found := made.format.config_refusal(schemes, list(high_precision(made)))) is not None:
        problems.append(Problem(found.reason, found.hint))
    return made


def anchored(recipe: Recipe, source: str | Path) -> Recipe:
    """The recipe with the source that is used, and with paths that hold from any working directory.

    The packaged model is what a recipe without a `model` means; hub ids and packaged texts keep their names.
    """
    stages = [_stage_anchored(stage) for stage in recipe.stages]
    return recipe.model_copy(update={"model": _model_anchored(source), "stages": stages})


def _model_anchored(source: str | Path) -> str | None:
    """A model by a path that holds everywhere; None for the packaged one, hub ids as they are."""
    directory = Path(source).expanduser()
    if not directory.is_dir():
        return str(source)
    return None if directory.samefile(content.default_model()) else str(directory.resolve())


def _stage_anchored(stage: Stage) -> Stage:
    if isinstance(stage, DistillStage) and stage.teacher is not None:
        stage = stage.model_copy(update={"teacher": _model_anchored(stage.teacher)})
    if isinstance(stage, DistillStage) and stage.cache is not None:
        stage = stage.model_copy(update={"cache": str(Path(stage.cache).resolve())})
    if isinstance(stage, PruneStage) and stage.stats is not None:
        stage = stage.model_copy(update={"stats": str(Path(stage.stats).resolve())})
    if stage.calibration is None:
        return stage
    parts = tuple(Part(_text_anchored(part.source), part.share) for part in parse_mix(stage.calibration.source))
    calibration = stage.calibration.model_copy(update={"source": spell(parts, placeless=False)})
    return stage.model_copy(update={"calibration": calibration})


def _text_anchored(source: str) -> str:
    text = Path(source)
    if packaged(source) or not text.is_file():  # what is not there is refused when it is read
        return source
    return str(text.resolve())


def _refuse_damaged(checkpoint: Checkpoint) -> None:
    problems = verify(checkpoint.path).problems
    if problems:
        raise IntegrityError(
            f"{checkpoint.path} is a damaged artifact: {problems[0]}", "run `compress verify` on it, or make it again"
        )

"""Sequence-level distillation: the teacher answers the prompts through the engine, then the student learns.

Answers are kept beside the output, in `OUTPUT.answers`, by a hash over what decides them: another training on the same
prompts does not ask again, and a run that was killed goes on behind the last shard of answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.stages import DistillStage

if TYPE_CHECKING:
    from compress.pipeline import RunResult
    from compress.pipeline.distill_job import DistillJob
    from compress.progress import Progress
    from compress.recipe import Recipe

FOLDER = "answers"


def run(
    recipe: Recipe,
    *,
    model: str | Path | None,
    output: str | Path | None,
    device: str,
    progress: Progress | None,
    **more: Any,
) -> RunResult:
    """`pipeline.run` of one stage, after its prompts, where it has any, were answered."""
    from compress import pipeline

    answers = None
    (stage,) = recipe.stages
    if isinstance(stage, DistillStage) and stage.calibration.answers is not None:
        answers = _answered(recipe, model, output, device, progress)
    return pipeline.run(recipe, model=model, output=output, device=device, progress=progress, answers=answers, **more)


def _answered(
    recipe: Recipe, model: str | Path | None, output: str | Path | None, device: str, progress: Progress | None
) -> Path:
    """The directory that holds the answers, all of them."""
    from compress.pipeline import teacher_answers
    from compress.pipeline.resolve import resolve
    from compress.progress import NullProgress

    job: DistillJob = resolve(recipe, model=model, output=output, device=device)  # type: ignore[assignment]
    job.refuse_problems()
    job.refuse_long_windows()
    folder = (
        job.family_directory / FOLDER if output is None else Path(output).with_name(f"{Path(output).name}.{FOLDER}")
    )
    config, prompts, seed = job.answers_config, job.prompts, job.recipe.seed
    path = teacher_answers.place(folder.resolve(), prompts, config, job.teacher.digest(), seed)
    teacher_answers.complete(path, prompts, _answering(job, device), seed, progress or NullProgress())
    return path


def _answering(job: DistillJob, device: str) -> Any:
    """The teacher in the engine, loaded once the first prompt is to be answered."""
    from compress.runtime.loading import load
    from compress.runtime.protocol import SamplingParams

    loaded: list[Any] = []
    config, end = job.answers_config, job.tokenizer.eos_token_id

    def answer(prompts: list[list[int]], seed: int) -> list[list[int]]:
        if not loaded:
            loaded.append(load(job.teacher.path, device=device))
        params = SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature, seed=seed)
        found = loaded[0].generate(prompts, params)
        ended = [] if end is None else [end]
        return [[*each.token_ids, *(ended if each.finish_reason == "stop" else [])] for each in found]

    return answer

"""A run and what follows it: make the artifact, score it against its parent, attach the scores.

The two halves are separate steps on disk: a run killed between them has a complete artifact without scores, and the
same command then only scores it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import IntegrityError, UserError
from compress.workflows.memory import available_memory, scoring_memory

if TYPE_CHECKING:
    from compress.artifact.reader import Artifact
    from compress.pipeline import RunResult
    from compress.progress import Progress
    from compress.recipe import Recipe

EVAL_TOKENS = 16384


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What a run made. `evaluation` is its eval record as plain data; where it is None, `not_scored` says why."""

    artifact: Artifact
    complete_already: bool
    resumed_blocks: int
    computed_blocks: int
    seconds: float
    evaluation: dict[str, Any] | None
    not_scored: str | None


def quantize(
    recipe: Recipe,
    *,
    model: str | Path | None = None,
    output: str | Path | None = None,
    device: str = "auto",
    restart: bool = False,
    evaluate: bool = True,
    eval_tokens: int = EVAL_TOKENS,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Runs a recipe and scores the artifact against its source on `eval_tokens` packaged held-out tokens.

    An artifact that is complete already is neither made nor scored again, unless its scores are damaged. One that
    cannot be scored here (no tokenizer, not enough memory for two dense models) is left unscored, and the result says
    so.

    Raises:
        UserError, WorkError, IntegrityError: as `pipeline.run` and `evaluation.evaluate` do.
    """
    from compress import pipeline

    run = pipeline.run(
        recipe, model=model, output=output, device=device, restart=restart, scored=evaluate, progress=progress
    )
    if not evaluate:
        return _result(run, run.artifact, "not asked for")
    if run.complete_already and _scores(run.artifact) is not None:
        return _result(run, run.artifact, None)
    from compress.content import default_model

    source = model or recipe.model or default_model()
    needed, free = scoring_memory(run.artifact, device), available_memory(device)
    if free is not None and needed > free:
        reason = f"it needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
        return _result(run, run.artifact, reason)
    try:
        artifact = score(run.artifact, source, device=device, max_tokens=eval_tokens, progress=progress)
    except UserError as error:
        return _result(run, run.artifact, error.message)
    return _result(run, artifact, None)


def score(
    artifact: Artifact,
    baseline: str | Path,
    *,
    device: str = "auto",
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Scores an artifact against a model on the packaged text, attaches the record and renders the card with it.

    Raises:
        UserError, WorkError, IntegrityError: as `evaluation.evaluate` and `artifact.attach` do.
    """
    from compress.artifact.attach import attach_eval
    from compress.evaluation.evaluate import evaluate

    record = evaluate(artifact.path, baseline, max_tokens=max_tokens, device=device, progress=progress)
    return attach_eval(artifact.path, record.model_dump(mode="json"))


def _scores(artifact: Artifact) -> dict[str, Any] | None:
    """The eval record; None without one, or with one that replacing it, cut short, left unlike its hash."""
    try:
        return artifact.eval()
    except IntegrityError:
        return None


def _result(run: RunResult, artifact: Artifact, not_scored: str | None) -> QuantizeResult:
    return QuantizeResult(
        artifact=artifact,
        complete_already=run.complete_already,
        resumed_blocks=run.resumed_blocks,
        computed_blocks=run.computed_blocks,
        seconds=run.seconds,
        evaluation=_scores(artifact),
        not_scored=not_scored,
    )

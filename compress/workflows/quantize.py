"""A run and what follows it: make the artifact, score it against its parent by the suite `smoke`, attach the scores.

The two halves are separate steps on disk: a run killed between them has a complete artifact without scores, and the
same command then only scores it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import content
from compress.errors import IntegrityError, UserError
from compress.workflows.memory import available_memory, scoring_memory

if TYPE_CHECKING:
    from compress.artifact.reader import Artifact
    from compress.evaluation.suites import Suite
    from compress.evaluation.verdict import Verdict
    from compress.pipeline import RunResult
    from compress.progress import Progress
    from compress.recipe import Recipe
    from compress.workflows.stages import StagesResult


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What a run made. `evaluation` is its eval record as plain data; where it is None, `not_scored` says why.

    `verdicts`: of the recipe's gates, in order. `stopped`: the number of the stage, from 1 on, behind which a gate
    ended the run, and whose artifact this is.
    """

    artifact: Artifact
    complete_already: bool
    resumed_blocks: int
    computed_blocks: int
    seconds: float
    evaluation: dict[str, Any] | None
    not_scored: str | None
    verdicts: tuple[Verdict, ...] = ()
    stopped: int | None = None


def quantize(
    recipe: Recipe,
    *,
    model: str | Path | None = None,
    output: str | Path | None = None,
    device: str = "auto",
    restart: bool = False,
    evaluate: bool = True,
    eval_tokens: int | None = None,
    progress: Progress | None = None,
    folder: Path | None = None,
) -> QuantizeResult:
    """Runs a recipe and scores the artifact against its source by the suite `smoke`.

    eval_tokens: held-out tokens to score, in place of the suite's 16,384. folder: where the stages before the last lie.

    An artifact that is complete already is neither made nor scored again, unless its scores are damaged. One that
    cannot be scored here (no tokenizer, not enough memory for two dense models) is left unscored, and the result says
    so.

    Raises:
        UserError, WorkError, IntegrityError: as `pipeline.run` and `evaluation.evaluate` do.
    """
    from compress.workflows import stages

    if evaluate:
        refuse_few_tokens(recipe, model, eval_tokens)
    done = stages.run(
        recipe,
        model=model,
        output=output,
        device=device,
        restart=restart,
        scored=evaluate,
        progress=progress,
        folder=folder,
    )
    made = _unscored(done, evaluate)
    if made is not None:
        return replace(made, verdicts=done.verdicts, stopped=done.stopped)
    made = _scored(recipe, done.run, model, device, eval_tokens, progress)
    return replace(made, verdicts=done.verdicts)


def refuse_few_tokens(recipe: Recipe, model: str | Path | None, eval_tokens: int | None) -> None:
    """UserError, before anything is made, where so few tokens are too few windows of the model for an interval."""
    if eval_tokens is None:
        return
    from compress.evaluation.window_sizes import fewest_tokens, standard_window
    from compress.models.checkpoint import Checkpoint
    from compress.models.hub import local_directory

    root = local_directory(model or recipe.model or content.default_model())
    length = standard_window(Checkpoint.open(root).config.get("max_position_embeddings"))
    if eval_tokens < (least := fewest_tokens(length)):
        raise UserError(
            f"{eval_tokens} held-out tokens are too few windows of {length} for an interval",
            f"give --eval-tokens of at least {least}, or --no-eval",
        )


def _unscored(done: StagesResult, evaluate: bool) -> QuantizeResult | None:
    """The result where nothing is left to be scored; None where the scoring that ends a run has to follow."""
    run = done.run
    if done.checked:
        return _result(run, run.artifact, None if _scores(run.artifact) is not None else "its gate reads no scores")
    if not evaluate:
        return _result(run, run.artifact, "not asked for")
    if run.complete_already and _scores(run.artifact) is not None:
        return _result(run, run.artifact, None)
    return None


def _scored(
    recipe: Recipe,
    run: RunResult,
    model: str | Path | None,
    device: str,
    eval_tokens: int | None,
    progress: Progress | None,
) -> QuantizeResult:
    from compress.workflows.stages import teacher_of

    source = (
        teacher_of(recipe) or model or recipe.model or content.default_model()
    )  # of several stages, what they began with
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
    suite: Suite | None = None,
    device: str = "auto",
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Scores an artifact against a model, attaches the record and renders the card with it.

    suite: `smoke` if None. max_tokens: tokens of a text, in place of the suite's. Killed, the same call goes on where
    it was.

    Raises:
        UserError, WorkError, IntegrityError: as `evaluation.evaluate` and `artifact.attach` do.
    """
    from compress.artifact.attach import attach_eval
    from compress.evaluation.evaluate import evaluate_with_samples
    from compress.evaluation.resume import keeping
    from compress.evaluation.scope import SMOKE
    from compress.workflows.kernel_parity import kernel_record

    suite = suite or suite_that_runs(SMOKE, progress)
    command = {"artifact": artifact.artifact_id, "baseline": str(baseline), "max_tokens": max_tokens, "device": device}
    command |= {} if suite.name == SMOKE else {"suite": suite.sha256()}
    with keeping(None, command, progress) as keep:
        done = evaluate_with_samples(
            artifact.path,
            baseline,
            suite=suite,
            max_tokens=max_tokens,
            device=device,
            cache_dir=keep,
            progress=progress,
        )
        return attach_eval(artifact.path, done.record.to_bytes(), done.samples, kernel_record(artifact.path))


def suite_that_runs(name: str, progress: Progress | None) -> Suite:
    """A suite, by name or file, without its tasks where lm-eval is not installed; a warning then says so."""
    from compress.evaluation.evaluate import EXTRA_HINT, can_run_tasks
    from compress.evaluation.suites import load_suite

    suite = load_suite(name)
    if not suite.tasks or can_run_tasks():
        return suite
    if progress is not None:
        progress.warn(f"the tasks of the suite {suite.name} were left out: they run on lm-eval ({EXTRA_HINT})")
    return suite.model_copy(update={"tasks": []})


def _scores(artifact: Artifact) -> dict[str, Any] | None:
    """The eval record; None without one, with one of an older schema, or one that replacing it, cut short, damaged."""
    from compress.evaluation.records import SCHEMA_VERSION

    try:
        record = artifact.eval()
    except IntegrityError:
        return None
    return record if record is not None and record.get("schema_version") == SCHEMA_VERSION else None


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

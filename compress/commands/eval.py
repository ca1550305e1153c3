"""`compress eval`: what a model scores, and what an artifact lost against its parent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.commands import _environment
from compress.commands._command import command
from compress.commands._files import check_writable
from compress.commands._options import (
    DTYPE_HELP,
    GENERAL,
    MEASURE,
    MODEL_OR_ARTIFACT_HELP,
    OUTPUT,
    Machine,
    ScoringKernel,
)
from compress.commands._output import View, facts, relative, size
from compress.commands._scores import score_rows
from compress.errors import UserError

if TYPE_CHECKING:
    from compress.evaluation.evaluate import Evaluation
    from compress.evaluation.records import EvalRecord

WHAT = "What to score"


@dataclass(frozen=True, kw_only=True)
class Eval(Machine):
    """Options of `compress eval`."""

    model: Annotated[
        str | None, typer.Argument(help=MODEL_OR_ARTIFACT_HELP, metavar="MODEL_OR_ARTIFACT", show_default=False)
    ] = None
    baseline: Annotated[
        str | None,
        typer.Option(help="Model to compare with on the same tokens; gives KL and agreement.", metavar="MODEL"),
    ] = None
    suite: Annotated[
        str | None,
        typer.Option(
            help="smoke, pr, nightly or release, or a suite file; the text alone if left out.",
            metavar="NAME|FILE",
            rich_help_panel=WHAT,
        ),
    ] = None
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks besides the suite's, by name (blimp:500 for 500 items) or file, separated by commas.",
            metavar="A,B",
            rich_help_panel=WHAT,
        ),
    ] = None
    data: Annotated[
        str | None,
        typer.Option(
            help="Text by name, or a UTF-8 or JSONL file, in place of the suite's; tales_heldout without a suite.",
            metavar="NAME|FILE",
            rich_help_panel=WHAT,
        ),
    ] = None
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of a text at most, spread over it; the suite's, else all.", rich_help_panel=WHAT),
    ] = None
    seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens per window; 512, or the context where that is shorter.", rich_help_panel=WHAT),
    ] = None
    cost: Annotated[
        bool, typer.Option("--cost", help="Measure load time, memory and speed too.", rich_help_panel=WHAT)
    ] = False
    output: Annotated[
        Path | None, typer.Option(help="Write the record to this file.", metavar="FILE", rich_help_panel=OUTPUT)
    ] = None
    attach: Annotated[
        bool,
        typer.Option("--attach", help="Attach the record to the artifact, and renew its card.", rich_help_panel=OUTPUT),
    ] = False
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            help="Keep finished answers here for later runs; else they are kept only until the record is made.",
            metavar="DIR",
            rich_help_panel=OUTPUT,
        ),
    ] = None
    trust_code: Annotated[
        bool,
        typer.Option(
            "--trust-code", help="Execute the Python scorers and programs that tasks name.", rich_help_panel=GENERAL
        ),
    ] = False
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP, metavar="NAME", rich_help_panel=GENERAL)] = "auto"
    kernel: ScoringKernel = "auto"


@command("eval", Eval, panel=MEASURE)
def eval_(options: Eval, view: View) -> None:
    """Score a model or an artifact: perplexity on held-out text and, by suite or by name, tasks and greedy answers.

    With --baseline also mean KL, top-1 agreement and the perplexity ratio on the same tokens, and which items flipped.
    Intervals are 95%, over documents or blocks of 2,048 tokens. The record holds the sums and the answers, so a gate
    can decide on it later without the model. With --json the record itself goes to stdout. A killed run goes on where
    it was when the same command is given again.

    A task file is JSONL with {"prompt": ..., "reference": ...} or {"prompt": ..., "choices": [...], "reference": 0} per
    line; a first line {"settings": {"match": "exact|contains|regex", "max_tokens": 64}} says how answers are judged.
    An lm-eval YAML file works too. A served model is given by its address, http://HOST/v1#NAME, and scored on tasks.

    Examples:

      $ compress eval
      $ compress eval ./artifact --baseline ./model --suite pr --output eval.json
      $ compress eval ./artifact --baseline ./model --tasks blimp:500 --json
    """
    _environment.prepare(options.threads)
    _environment.import_models()
    if options.attach:
        _check_attachable(options)
    check_writable("--output", options.output)
    from compress.evaluation.resume import keeping

    progress = view.progress()
    with keeping(options.cache_dir, _command(options), progress) as keep:
        from compress.content import default_model
        from compress.evaluation.evaluate import evaluate_with_samples

        evaluation = evaluate_with_samples(
            options.model or default_model(),
            options.baseline,
            suite=options.suite,
            data=options.data,
            tasks=() if options.tasks is None else options.tasks.split(","),
            max_tokens=options.max_tokens,
            seq_len=options.seq_len,
            device=options.device,
            dtype=options.dtype,
            kernel=options.kernel,
            cost=options.cost,
            cache_dir=keep,
            trust_code=options.trust_code,
            progress=progress,
        )
        _store(options, evaluation, view)
    record = evaluation.record
    view.result(record.model_dump(mode="json"), facts(_pairs(record)))
    for task in record.tasks:
        if task.why_not is not None:
            view.note(f"{task.name} is shown, not gated: {task.why_not}")
    if record.baseline is None:
        view.note("no --baseline given: KL, agreement and flips were not measured")


def _store(options: Eval, evaluation: Evaluation, view: View) -> None:
    """Writes and attaches what was asked for; the record last, so that whoever finds it finds its samples too."""
    if options.output is not None:
        from compress.artifact import durable
        from compress.evaluation.records import write_record

        if evaluation.samples is not None:
            durable.write_atomic(_samples_path(options.output), evaluation.samples)
            view.note(f"answers item by item written to {relative(_samples_path(options.output))}")
        write_record(evaluation.record, options.output)
        view.note(f"record written to {relative(options.output)}")
    if options.attach:
        from compress.artifact.attach import attach_eval
        from compress.workflows.kernel_parity import kernel_record

        model = str(options.model)
        attach_eval(model, evaluation.record.to_bytes(), evaluation.samples, kernel_record(model))
        view.note(f"attached to {options.model}")


def _samples_path(output: Path) -> Path:
    """Beside the record: samples.jsonl.gz for eval.json, v1.samples.jsonl.gz for v1.eval.json or v1.json."""
    stem = output.name.removesuffix(".json").removesuffix("eval").rstrip(".")
    return output.with_name(f"{stem}.samples.jsonl.gz" if stem else "samples.jsonl.gz")


def _pairs(record: EvalRecord) -> list[tuple[str, object]]:
    """What was scored, on what, with what result, and what computed it."""
    machine = record.environment
    pairs: list[tuple[str, object]] = [("model", f"{record.model.name}, {size(record.model.weights_bytes)}")]
    if record.baseline is not None:
        pairs.append(("baseline", f"{record.baseline.name}, {size(record.baseline.weights_bytes)}"))
    if record.suite is not None:
        pairs.append(("suite", f"{record.suite.name} ({record.suite.sha256[:12]})"))
    for text in record.texts:
        data = text.data
        kind = f"{data.clusters} {data.cluster_kind}"
        pairs.append(("text", f"{data.name}: {data.tokens} tokens in {kind}, windows of {data.seq_len}"))
    for name, parent, value in score_rows(record.model_dump(mode="json")):
        shown = parent if parent not in ("", "0", "1", "100%") else ""
        pairs.append((name, value + (f"  (baseline {shown})" if shown else "")))
    pairs.append(("computed", f"{machine.runtime}, {machine.kernel} {machine.dtype} on {machine.device}"))
    return pairs


def _command(options: Eval) -> dict[str, object]:
    """What tells this evaluation from others: not what it writes, so that it goes on however it is given again."""
    from dataclasses import asdict

    ignored = ("json_mode", "quiet", "debug", "output", "attach", "cache_dir")
    told = {name: value for name, value in asdict(options).items() if name not in ignored}
    return {"in": str(Path.cwd()), **told}


def _check_attachable(options: Eval) -> None:
    """Before the work: --attach needs an artifact."""
    from compress.artifact.reader import Artifact

    if options.model is None:
        raise UserError("--attach needs an artifact, and none is given", "name it: compress eval ARTIFACT --attach")
    Artifact.open(options.model)

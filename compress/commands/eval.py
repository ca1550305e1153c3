"""`compress eval`: what a model scores, and what an artifact lost against its parent."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from compress.commands import _environment
from compress.commands._command import command
from compress.commands._options import DTYPE_HELP, GENERAL, MEASURE, MODEL_OR_ARTIFACT_HELP, OUTPUT, Machine
from compress.commands._output import View, facts, relative, size
from compress.commands._scores import score_rows
from compress.errors import UserError

TEXT = "Text"


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
    data: Annotated[
        str | None,
        typer.Option(
            help="Packaged text by name, or a UTF-8 text file; tales_heldout if left out.",
            metavar="NAME|FILE",
            rich_help_panel=TEXT,
        ),
    ] = None
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens at most, spread over the text; all if left out.", rich_help_panel=TEXT)
    ] = None
    seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens per window; 512, or the context where that is shorter.", rich_help_panel=TEXT),
    ] = None
    output: Annotated[
        Path | None, typer.Option(help="Write the record to this file.", metavar="FILE", rich_help_panel=OUTPUT)
    ] = None
    attach: Annotated[
        bool,
        typer.Option("--attach", help="Attach the record to the artifact, and renew its card.", rich_help_panel=OUTPUT),
    ] = False
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP, metavar="NAME", rich_help_panel=GENERAL)] = "auto"


@command("eval", Eval, panel=MEASURE)
def eval_(options: Eval, view: View) -> None:
    """Score a model or an artifact on held-out text: perplexity with a 95% interval over blocks of 2,048 tokens.

    With --baseline also mean KL, top-1 agreement and the perplexity ratio, on the same tokens. The record holds the
    sums per block, so a gate can decide on it later without the model. With --json the record itself goes to stdout.

    Examples:

      $ compress eval
      $ compress eval ./artifact --baseline ./model --output eval.json
      $ compress eval ./artifact --baseline ./model --max-tokens 16384 --json
    """
    _environment.prepare(options.threads)
    if options.attach:
        _check_attachable(options)
    if options.output is not None:
        _check_writable(options.output)
    from compress.workflows import api

    record = api.evaluate(
        options.model,
        options.baseline,
        data=options.data,
        max_tokens=options.max_tokens,
        seq_len=options.seq_len,
        device=options.device,
        dtype=options.dtype,
        progress=view.progress(),
    )
    plain = record.model_dump(mode="json")
    if options.output is not None:
        from compress.evaluation.records import write_record

        write_record(record, options.output)
        view.note(f"record written to {relative(options.output)}")
    if options.attach:
        from compress.artifact.attach import attach_eval

        attach_eval(str(options.model), plain)
        view.note(f"attached to {options.model}")
    data, machine = record.data, record.environment
    pairs = [("model", f"{record.model.name}, {size(record.model.weights_bytes)}")]
    if record.baseline is not None:
        pairs.append(("baseline", f"{record.baseline.name}, {size(record.baseline.weights_bytes)}"))
    pairs.append(("text", f"{data.name}: {data.tokens} tokens in {data.blocks} blocks, windows of {data.seq_len}"))
    for name, parent, value in score_rows(plain):
        pairs.append((name, value + (f"  (baseline {parent})" if name == "perplexity" and parent else "")))
    pairs.append(("computed", f"{machine.runtime}, {machine.kernel} {machine.dtype} on {machine.device}"))
    view.result(plain, facts(pairs))
    if record.baseline is None:
        view.note("no --baseline given: KL and agreement were not measured")


def _check_writable(output: Path) -> None:
    """Before the work: --output must be a file that can be written."""
    if output.is_dir():
        raise UserError(f"--output {output} is a directory", "give the path of a file")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no directory {output.parent}", "make it, or give another path")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise UserError(f"--output {output} cannot be written: permission denied", "give another path")


def _check_attachable(options: Eval) -> None:
    """Before the work: --attach needs an artifact."""
    from compress.artifact.reader import Artifact

    if options.model is None:
        raise UserError("--attach needs an artifact, and none is given", "name it: compress eval ARTIFACT --attach")
    Artifact.open(options.model)

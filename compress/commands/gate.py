"""`compress gate`: whether a compressed model may be released."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from compress.commands import _environment
from compress.commands._command import Outcome, command
from compress.commands._options import DTYPE_HELP, GENERAL, MEASURE, Machine
from compress.commands._output import View, number

OUTCOMES = {"PASS": Outcome.OK, "FAIL": Outcome.GATE_FAILED, "INCONCLUSIVE": Outcome.INCONCLUSIVE}


@dataclass(frozen=True, kw_only=True)
class Gate(Machine):
    """Options of `compress gate`."""

    candidate: Annotated[
        str, typer.Argument(help="Artifact, model directory or eval.json.", metavar="CANDIDATE", show_default=False)
    ]
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Model, artifact or eval.json to compare with; not needed if the scores name one.", metavar="PATH"
        ),
    ] = None
    policy: Annotated[
        Path | None, typer.Option(help="Policy, a TOML file; the packaged default if left out.", metavar="FILE")
    ] = None
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP, metavar="NAME", rich_help_panel=GENERAL)] = "auto"


@command("gate", Gate, panel=MEASURE)
def gate(options: Gate, view: View) -> Outcome:
    """Decide by a policy whether a candidate lost too much against its baseline: pass, fail or inconclusive.

    Existing scores are used where they fit; otherwise both models are scored. Exit codes: 0 pass, 1 fail,
    3 inconclusive, 2 a mistake in the request, 4 the work failed, 5 damaged or not comparable.

    Examples:

      $ compress gate ./artifact
      $ compress gate ./artifact --baseline ./model --policy eval/gates/default.toml
      $ compress gate candidate/eval.json --policy release.toml --json
    """
    _environment.prepare(options.threads)
    from compress.workflows import api

    verdict = api.gate(
        options.candidate,
        options.baseline,
        options.policy,
        device=options.device,
        dtype=options.dtype,
        progress=view.progress(),
    )
    rows = [
        (r.id, r.role, number(r.estimate), f"{number(r.low)} to {number(r.high)}", f"{r.rule} {r.limit:g}", r.verdict)
        for r in verdict.gates
    ]
    title = f"{verdict.candidate.name} against {verdict.baseline.name}, policy {verdict.policy}"
    view.table(title, ("GATE", "ROLE", ">ESTIMATE", "BOUNDS", "LIMIT", "VERDICT"), rows)
    reasons = [f"{r.verdict}: {r.id}: {r.message}" for r in verdict.gates if r.verdict != "PASS"]
    view.result(verdict.model_dump(mode="json"), [*reasons, verdict.verdict])
    for warning in verdict.warnings:
        view.warn(warning)
    return OUTCOMES[verdict.verdict]

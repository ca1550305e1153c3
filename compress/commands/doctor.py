"""`compress doctor`: whether this installation is whole, and what it uses; or whether an engine loads an artifact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from compress.commands import _environment
from compress.commands._command import Outcome, command
from compress.commands._options import LOOK, Common
from compress.commands._output import View, facts, one_line
from compress.errors import IntegrityError, UserError, WorkError


@dataclass(frozen=True, kw_only=True)
class Doctor(Common):
    """Options of `compress doctor`."""

    artifact: Annotated[
        Path | None,
        typer.Argument(help="An artifact or model directory, with --engine.", metavar="ARTIFACT", show_default=False),
    ] = None
    engine: Annotated[
        str | None,
        typer.Option(help="vllm, sglang, trtllm, transformers, llamacpp or tgi.", metavar="NAME", show_default=False),
    ] = None
    tensor_parallel: Annotated[
        int | None,
        typer.Option(min=1, help="GPUs that share every linear out (vllm); one if left out.", show_default=False),
    ] = None


@command("doctor", Doctor, panel=LOOK)
def doctor(options: Doctor, view: View) -> Outcome | None:
    """Check the installation: versions, processor, kernels and why each was chosen, kernel parity, packaged content.

    With ARTIFACT and --engine it says instead whether that engine loads the artifact, what would go wrong and what to
    change, from rules with their sources; the engine need not be installed.

    Exit code 1 if the engine does not load the artifact, 3 if no rule says so or otherwise, 4 if something does not
    work, 5 if packaged content is damaged.

    Examples:

      $ compress doctor
      $ compress doctor ./artifact --engine vllm
      $ compress doctor ./artifact --engine vllm --tensor-parallel 4
      $ compress doctor ./artifact --engine trtllm --json
    """
    _environment.prepare()
    if (options.artifact is None) != (options.engine is None):
        raise UserError("ARTIFACT and --engine go together", "for example: compress doctor ./artifact --engine vllm")
    if options.artifact is not None and options.engine is not None:
        return _about_engine(options.artifact, options.engine, options.tensor_parallel or 1, view)
    if options.tensor_parallel is not None:
        raise UserError("--tensor-parallel goes with an engine", "give ARTIFACT and --engine vllm too")
    _about_installation(view)
    return None


def _about_engine(artifact: Path, engine: str, gpus: int, view: View) -> Outcome:
    from compress.artifact.reader import follow_latest
    from compress.models.checkpoint import Checkpoint
    from compress.workflows.engines import diagnose

    found = diagnose(Checkpoint.open(follow_latest(artifact)), engine, gpus)
    lines = [f"{engine}{f', {gpus} GPUs' if gpus > 1 else ''}: {found.answer}"]
    for finding in found.findings:
        others = f" and {finding.linears - 1} more" if finding.linears > 1 else ""
        about = "" if finding.linear is None else f" ({one_line(finding.linear)}{others})"
        lines += [f"{finding.verdict}: {finding.why}{about}", f"  {finding.hint}", f"  source: {finding.source}"]
    view.result(
        {
            "engine": engine,
            "tensor_parallel": gpus,
            "format": found.format,
            "answer": found.answer,
            "findings": found.findings,
        },
        lines,
    )
    return {"does not load": Outcome.GATE_FAILED, "not known": Outcome.INCONCLUSIVE}.get(found.answer, Outcome.OK)


def _about_installation(view: View) -> None:
    from compress.workflows.doctor import examine

    checks = examine()
    broken = [check for check in checks if check.broken is not None]
    view.result(
        {"ok": not broken, "checks": checks},
        facts((check.name, check.detail if check.broken is None else f"BROKEN: {check.detail}") for check in checks),
    )
    if broken:
        first = broken[0]
        kind = IntegrityError if first.broken == "integrity" else WorkError
        raise kind(f"{len(broken)} of {len(checks)} checks failed, the first: {first.name}: {first.detail}", first.hint)

"""What a GitHub Actions step shows of a verdict: its summary, its outputs, and annotations on the run.

Files only, named by the environment; nothing here uses the network. Outside of Actions nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import WorkError
from compress.evaluation.reports.markdown import render
from compress.evaluation.reports.values import limit, measured
from compress.evaluation.reports.verbatim import one_line, workflow_data, workflow_property
from compress.evaluation.reports.verdict_document import blocks

if TYPE_CHECKING:
    from compress.evaluation.verdict import GateResult, Verdict

SHOWN = 10
"""GitHub shows this many annotations of each level per step, and drops the rest without a word."""

SUMMARY_LIMIT = 1024 * 1024
_MESSAGE = 1000


def publish(verdict: Verdict, environ: Mapping[str, str] | None = None) -> list[str]:
    """Appends to the step summary and the step outputs where `environ` names them.

    Returns:
        The annotation lines, to be printed on stderr or stdout by the caller; none outside of Actions.

    Raises:
        WorkError: a file that the environment names cannot be written.
    """
    environment = os.environ if environ is None else environ
    lines: list[str] = []
    if path := environment.get("GITHUB_STEP_SUMMARY"):
        text = render(verdict)
        if _size(path) + len(text.encode()) < SUMMARY_LIMIT:
            _append(path, text)
        else:
            lines.append("::warning title=compress gate::the step summary is full: the table of gates is left out")
    if path := environment.get("GITHUB_OUTPUT"):
        _append(path, "".join(f"{name}={value}\n" for name, value in outputs(verdict).items()))
    return annotation_lines(verdict) + lines if environment.get("GITHUB_ACTIONS") == "true" else []


def outputs(verdict: Verdict) -> dict[str, str]:
    """Step outputs by name, each one line."""
    held = [gate.id for gate in verdict.gates if blocks(verdict, gate)]
    return {
        "verdict": verdict.verdict,
        "exit-code": str(verdict.exit_code),
        "candidate": one_line(verdict.candidate.name),
        "not-passed": one_line(" ".join(held)),
        "verdict-sha256": verdict.sha256,
    }


def annotation_lines(verdict: Verdict) -> list[str]:
    """Workflow commands: how many there are, then at most ten errors for what blocked and ten warnings for the rest."""
    errors = [gate for gate in verdict.gates if blocks(verdict, gate)]
    others = [gate for gate in verdict.gates if gate.verdict != "PASS" and gate not in errors]
    if not errors and not others:
        return [_command("notice", "compress gate", f"PASS: all {len(verdict.gates)} gates")]
    count = (
        f"{verdict.verdict}: of {len(verdict.gates)} gates {len(errors)} block and {len(others)} more did not pass; "
        f"shown: {min(len(errors), SHOWN)} and {min(len(others), SHOWN)}"
    )
    return [
        _command("notice", "compress gate", count),
        *(_annotation("error", gate) for gate in errors[:SHOWN]),
        *(_annotation("warning", gate) for gate in others[:SHOWN]),
    ]


def _annotation(level: str, gate: GateResult) -> str:
    message = f"{gate.verdict}: {measured(gate)}, limit {limit(gate)}: {gate.message}"
    return _command(level, f"gate {gate.id}", message)


def _command(level: str, title: str, message: str) -> str:
    shown = workflow_data(one_line(message, _MESSAGE))
    return f"::{level} title={workflow_property(one_line(title, 200))}::{shown}"


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0


def _append(path: str, text: str) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise WorkError(
            f"cannot write {path}: {error.strerror}", "GITHUB_STEP_SUMMARY and GITHUB_OUTPUT must name writable files"
        ) from error

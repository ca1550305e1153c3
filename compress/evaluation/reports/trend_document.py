"""A history as a report: what changed, what is flagged, and one small picture per gate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.evaluation.reports.document import Document, Picture, Section, Table
from compress.evaluation.reports.scale import worse
from compress.evaluation.reports.trend import GateTrend, Run, Trend
from compress.evaluation.reports.values import NONE, interval, limit_text, value, with_unit
from compress.evaluation.reports.verbatim import Verbatim

if TYPE_CHECKING:
    from compress.evaluation.reports.plots import TrendPanel

RUNS = 60
"""The newest runs that pictures show."""


def trend_document(found: Trend) -> Document:
    """The table of gates, the flags, the picture, the runs."""
    newest = found.lines[-1]
    sections = [Section("Gates", table=gates_table(found))]
    if found.flags:
        rows = tuple((Verbatim(gate.id), flag) for gate in found.gates for flag in gate.flags)
        sections.insert(0, Section("Flagged", table=Table(("gate", "what"), rows)))
    if found.gates:
        sections.append(
            Section(
                "Over time",
                ("Runs are joined where environment and text are the same; only they can be compared.",),
                picture=Picture(lambda: trend_svg(found), "gate values with intervals over the runs"),
            )
        )
    runs = tuple(
        (line.date, Verbatim(line.commit[:12]), Verbatim(line.release or ""), line.verdict, Verbatim(line.candidate),
         Verbatim(line.candidate_digest[:12]), Verbatim(line.environment_sha256[:8]))
        for line in reversed(found.lines)
    )  # fmt: skip
    columns = ("date", "commit", "release", "verdict", "candidate", "digest", "environment")
    sections.append(Section("Runs", table=Table(columns, runs), folded=True))
    lead = f"{len(found.lines)} runs from {found.lines[0].date} to {newest.date}, the newest {newest.name}"
    status = "nothing is flagged" if not found.flags else f"{len(found.flags)} flagged"
    return Document("Gate values over time", (lead, status), tuple(sections))


def gates_table(found: Trend) -> Table:
    """One row per gate of the newest run."""
    columns = ("gate", "against", ">now", ">limit", "since", ">change", ">steps together", ">runs", "flags")
    return Table(columns, tuple(_row(gate) for gate in found.gates))


def trend_svg(found: Trend) -> bytes:
    """The panels of all gates, the newest runs only."""
    from compress.evaluation.reports.plots import svg, trend

    first = max(0, len(found.lines) - RUNS)
    shown = found.lines[first:]
    names = [line.name if line.release is None else f"{line.release} {line.commit[:8]}" for line in shown]
    several = len({gate.baseline for gate in found.gates}) > 1
    panels = [_panel(gate, first, several) for gate in found.gates]
    return svg(trend(panels, names, f"Gate values, {len(shown)} of {len(found.lines)} runs"))


def _panel(gate: GateTrend, first: int, several: bool) -> TrendPanel:
    from compress.evaluation.reports.plots import TrendPanel, TrendPoint

    runs = [run for run in gate.runs if run.place >= first]
    factor = 100.0 if gate.newest.gate.unit == "share" else 1.0
    points = tuple(
        TrendPoint(
            run.place - first,
            factor * (run.gate.estimate or 0.0),
            None if run.gate.low is None else factor * run.gate.low,
            None if run.gate.high is None else factor * run.gate.high,
            _series(run),
            run.line.release is not None,
        )
        for run in runs
    )
    limits = tuple((run.place - first, factor * run.gate.limit) for run in runs if run.gate.limit is not None)
    unit = "%" if gate.newest.gate.unit == "share" else gate.newest.gate.unit
    title = f"{gate.id} ({gate.baseline})" if several else gate.id
    return TrendPanel(title, unit, points, limits, worse(gate.newest.gate.rule), "flagged" if gate.flags else None)


def _series(run: Run) -> str:
    """Names what may be joined: the environment, and the text where the gate is about one."""
    tokens = run.line.texts.get(run.gate.subject or "")
    text = f", {run.gate.subject} {tokens[:6]}" if tokens else ""
    return f"{run.line.environment} {run.line.environment_sha256[:8]}{text}"


def _row(gate: GateTrend) -> tuple[str, ...]:
    now, unit = gate.newest.gate, gate.newest.gate.unit
    shown = "" if unit == "share" else unit
    change = NONE
    if gate.change is not None:
        noise = "" if gate.noise is None else f" ± {value(gate.noise, unit)}"
        change = f"{'+' if gate.change > 0 else ''}{value(gate.change, unit)}{noise}"
    return (
        Verbatim(gate.id),
        Verbatim(gate.baseline),
        with_unit(interval(now.estimate, now.low, now.high, unit), shown),
        limit_text(now.limit, now.rule, unit),
        Verbatim(gate.since.line.name) if gate.since is not None else NONE,
        change,
        f"{value(gate.total, unit)} in {gate.steps}" if gate.total is not None else NONE,
        str(len(gate.runs)),
        str(len(gate.flags)) if gate.flags else NONE,
    )

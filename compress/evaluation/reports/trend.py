"""What the runs in a history say together that no single gate says: change since the last release, and slow drift.

A gate asks of one release whether it lost too much. Ten releases that lose 0.3 points each pass ten gates with a limit
of 1 point and lose 3. Three questions are asked of each gate, over runs of one environment and one text:

- since the last release (or the first run): is the value surely worse, beyond the noise of both runs together?
- drift: against one and the same baseline, do the values get worse run by run (Kendall's tau, one-sided, Holm over the
  gates), by a tenth of the allowed loss or more?
- sum of steps: where each run's baseline is an earlier candidate, do the steps add up to more than the limit allows
  for one of them? Points of accuracy add up; perplexity and KL ratios multiply.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from compress.evaluation.reports.history import GateValue, HistoryLine
from compress.evaluation.reports.scale import loss_share, worse
from compress.evaluation.reports.values import value, with_unit

ALPHA = 0.05
FEWEST = 5
"""Runs that a drift is told from: of five in random order, one in 120 would fall without a break."""

NOTICEABLE = 0.1
"""Share of the allowed loss below which a drift, however steady, is not worth a flag."""

ADDED = frozenset({"accuracy_paired"})
MULTIPLIED = frozenset({"ppl_ratio", "kl_increase"})


@dataclass(frozen=True, slots=True)
class Run:
    """One gate in one run: its place in the history, the line, and the value."""

    place: int
    line: HistoryLine
    gate: GateValue


@dataclass(frozen=True, slots=True)
class GateTrend:
    """One gate over time, `runs` the oldest first, of every environment.

    `fixed`: the runs that may be compared with the newest one and have the same baseline, itself included. `since`: the
    run compared with, the last release of the same environment before the newest run, else the first run.
    `change`: newest value minus that one's, with half the width of its interval in `noise`; positive `loss` is worse.
    `steps`, `total`: how many runs are chained by their baselines, and what they lost together. `flags` say what is
    wrong, in words; an empty tuple is good.
    """

    id: str
    baseline: str
    runs: tuple[Run, ...]
    fixed: tuple[Run, ...]
    since: Run | None
    change: float | None
    noise: float | None
    steps: int
    total: float | None
    drift_p: float | None
    flags: tuple[str, ...]

    @property
    def newest(self) -> Run:
        """The last run."""
        return self.runs[-1]


@dataclass(frozen=True, slots=True)
class Trend:
    """A history and what it says of every gate of its newest run."""

    lines: tuple[HistoryLine, ...]
    gates: tuple[GateTrend, ...]

    @property
    def flags(self) -> list[str]:
        """All flags, each with its gate."""
        return [f"{gate.id}: {flag}" for gate in self.gates for flag in gate.flags]


def trend(lines: Sequence[HistoryLine]) -> Trend:
    """Follows every gate that the newest run has a value for. `lines` are in order of time, the oldest first."""
    if not lines:
        return Trend((), ())
    found = [follow(lines, gate.id, gate.baseline) for gate in lines[-1].gates if gate.estimate is not None]
    return Trend(tuple(lines), tuple(_flag_drift(found)))


def follow(lines: Sequence[HistoryLine], gate: str, baseline: str) -> GateTrend:
    """One gate of the newest run, followed back; drift is flagged later, over all gates together."""
    runs = [
        Run(place, line, found)
        for place, line in enumerate(lines)
        for found in line.gates
        if (found.id, found.baseline) == (gate, baseline) and found.estimate is not None
    ]
    newest = runs[-1]
    alike = [run for run in runs if comparable(run, newest)]
    fixed = [run for run in alike if run.gate.baseline_digest == newest.gate.baseline_digest]
    since = _reference(fixed)
    flags = []
    change = noise = None
    if since is not None:
        change, noise = _change(since.gate, newest.gate)
        exact_and_small = noise == 0.0 and (_grown(since.gate, newest.gate) or 1.0) < NOTICEABLE
        if worse(newest.gate.rule) * change > noise and not exact_and_small:
            lost = _loss(newest.gate, change)
            flags.append(f"worse than at {since.line.name} by {lost}, more than the noise of both runs")
    chain = _chain(alike)
    total = _total([run.gate for run in chain]) if len(chain) > 1 else None
    if total is not None and newest.gate.limit is not None:
        share = loss_share(total, newest.gate.limit, newest.gate.rule, newest.gate.kind)
        if share is not None and share > 1.0:
            limit = with_unit(value(newest.gate.limit, newest.gate.unit), newest.gate.unit)
            flags.append(
                f"{len(chain)} steps since {chain[0].line.name} add up to {_loss(newest.gate, total)}, "
                f"more than the limit of one ({limit})"
            )
    drift = _drift(fixed) if len(fixed) >= FEWEST else None
    return GateTrend(
        gate, baseline, tuple(runs), tuple(fixed), since, change, noise, len(chain), total, drift, tuple(flags)
    )


def comparable(one: Run, other: Run) -> bool:
    """Whether two runs of a gate were made in one environment, on one text, in one unit."""
    a, b = one.gate, other.gate
    return (
        one.line.environment_sha256 == other.line.environment_sha256
        and (a.kind, a.unit, a.rule, a.subject) == (b.kind, b.unit, b.rule, b.subject)
        and _tokens(one) == _tokens(other)
    )


def _tokens(run: Run) -> str | None:
    """The hash of the text that a gate is about; None where it is about a task or a cost."""
    return run.line.texts.get(run.gate.subject or "")


def _reference(fixed: Sequence[Run]) -> Run | None:
    """The last release before the newest run; the first run where there was none; None where there is no other run."""
    earlier = fixed[:-1]
    released = [run for run in earlier if run.line.release is not None]
    return next(iter(reversed(released or earlier[:1])), None)


def _change(old: GateValue, new: GateValue) -> tuple[float, float]:
    """Newest minus old, and the half-width of its interval as if the two were independent, which is the wider side."""
    assert old.estimate is not None
    assert new.estimate is not None
    halves = []
    for gate in (old, new):
        known = gate.low is not None and gate.high is not None
        halves.append((gate.high - gate.low) / 2 if known else math.inf)  # type: ignore[operator]
    return new.estimate - old.estimate, math.hypot(*halves)


def _chain(alike: Sequence[Run]) -> list[Run]:
    """The newest run, the run of its baseline, the run of that one's baseline and so on, the oldest first."""
    chain = [alike[-1]]
    while True:
        wanted = chain[0].gate.baseline_digest
        earlier = [r for r in alike if r.place < chain[0].place and r.line.candidate_digest == wanted]
        if not earlier or wanted == chain[0].line.candidate_digest:
            return chain
        chain.insert(0, earlier[-1])


def _total(chain: Sequence[GateValue]) -> float | None:
    """What steps lost together; None for a kind whose values do not add up."""
    values = [gate.estimate for gate in chain if gate.estimate is not None]
    if chain[0].kind in ADDED and chain[0].unit == "points":
        return math.fsum(values)
    if chain[0].kind in MULTIPLIED and all(step > -1.0 for step in values):
        return math.expm1(math.fsum(math.log1p(step) for step in values))
    return None


def _drift(fixed: Sequence[Run]) -> float | None:
    """P-value of "the values do not get worse with time"; None where they never change."""
    from scipy.stats import kendalltau  # type: ignore[import-untyped]

    losses = [worse(run.gate.rule) * (run.gate.estimate or 0.0) for run in fixed]
    if len(set(losses)) == 1:
        return None
    return float(kendalltau(range(len(losses)), losses, alternative="greater").pvalue)


def _flag_drift(found: Sequence[GateTrend]) -> list[GateTrend]:
    """Adds the flag of a drift to the gates whose p-values stand together (Holm) and whose loss is noticeable."""
    p_values = {str(i): gate.drift_p for i, gate in enumerate(found) if gate.drift_p is not None}
    rejected = _holm(p_values)
    return [
        replace(gate, flags=(*gate.flags, *_drift_flag(gate))) if rejected.get(str(i)) else gate
        for i, gate in enumerate(found)
    ]


def _drift_flag(gate: GateTrend) -> list[str]:
    first, last = gate.fixed[0], gate.fixed[-1]
    grown = _grown(first.gate, last.gate)
    if grown is not None and grown < NOTICEABLE:
        return []
    assert first.gate.estimate is not None
    assert last.gate.estimate is not None
    lost = _loss(last.gate, last.gate.estimate - first.gate.estimate)
    part = "" if grown is None else f", {grown:.0%} of the allowed loss"
    return [f"drifts: {lost} lost over {len(gate.fixed)} runs since {first.line.name}{part} (p {gate.drift_p:.2g})"]


def _grown(old: GateValue, new: GateValue) -> float | None:
    """By how much the share of the allowed loss grew; None where it cannot be told."""
    if new.limit is None:
        return None
    shares = [loss_share(gate.estimate, new.limit, new.rule, new.kind) for gate in (old, new)]
    return None if shares[0] is None or shares[1] is None else shares[1] - shares[0]


def _holm(p_values: Mapping[str, float]) -> dict[str, bool]:
    from compress.evaluation.statistics.multiplicity import holm

    return holm(p_values, ALPHA) if p_values else {}


def _loss(gate: GateValue, change: float) -> str:
    """The size of a change, with its unit; a change of a share is in points of percent."""
    if gate.unit == "share":
        return f"{value(100 * abs(change))} percentage points"
    return with_unit(value(abs(change), gate.unit), gate.unit)

"""What a verdict says of itself: whether its gates follow from their bounds, and its outcome from its gates.

This needs neither records nor policy, and proves nothing about where the numbers came from. Free of torch.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable

from compress.evaluation.verdict import GateOutcome, GateResult, Outcome, Verdict


def contradiction(verdict: Verdict) -> str | None:
    """The first thing in a verdict that does not follow from the rest; None if all does."""
    for gate in verdict.gates:
        if gate.verdict not in _answers(gate, verdict.created):
            return f"the gate {gate.id} cannot be {gate.verdict} with its bounds, limit and waiver"
        if gate.baseline not in verdict.baselines:
            return f"the gate {gate.id} names the baseline {gate.baseline!r}, which it does not hold"
    if missing := [name for name in verdict.baselines if name not in verdict.records]:
        return f"it names no record of the baseline {missing[0]!r}"
    if not verdict.baselines or not any(gate.role == "primary" for gate in verdict.gates):
        return "it holds no primary gate, or no baseline"
    if verdict.verdict not in _outcomes(verdict):
        return f"its gates cannot give {verdict.verdict}"
    if not 1 <= verdict.look <= verdict.looks:
        return f"there is no look {verdict.look} of {verdict.looks}"
    return None


def expired(verdict: Verdict, today: datetime.date) -> Verdict:
    """The verdict as it stands on a day: what a waiver excuses fails once its last day has passed."""
    gates = [_expired(gate, today) for gate in verdict.gates]
    if gates == verdict.gates:
        return verdict
    return verdict.model_copy(update={"gates": gates, "verdict": "FAIL", "created": today}).sealed()


def _expired(gate: GateResult, today: datetime.date) -> GateResult:
    until = _until(gate)
    if gate.verdict != "WAIVED" or (until is not None and today <= until):
        return gate
    message = f"its waiver has expired ({gate.waiver}); {gate.message}"
    return gate.model_copy(update={"verdict": "FAIL", "message": message})


def _answers(gate: GateResult, day: datetime.date) -> set[GateOutcome]:
    """The verdicts that a gate can have had on a day."""
    plain = _from_bounds(gate)
    if gate.waiver is None or plain == {"PASS"}:
        return plain if gate.waiver is None else set()
    until = _until(gate)
    if until is None:
        return set()
    return {"WAIVED"} if day <= until else {"FAIL"}


def _from_bounds(gate: GateResult) -> set[GateOutcome]:
    """What is no number fails; a secondary failure may be withdrawn when all are tested together (Holm)."""
    if gate.limit is None:
        return {"SKIPPED"} if gate.estimate is gate.low is gate.high is None else set()
    low, high = (gate.low, gate.high) if gate.rule == "at most" else (gate.high, gate.low)
    sign = 1 if gate.rule == "at most" else -1
    found: set[GateOutcome]
    if high is not None and sign * high <= sign * gate.limit:
        found = {"PASS"}
    elif low is not None and sign * low > sign * gate.limit:
        found = {"FAIL", "INCONCLUSIVE"} if gate.role == "secondary" else {"FAIL"}
    else:
        found = {"INCONCLUSIVE"}
    return found | {"FAIL"} if None in (gate.estimate, low, high) else found


def _outcomes(verdict: Verdict) -> Iterable[Outcome]:
    """The outcomes that some policy gives for these gates."""
    primary = {gate.verdict for gate in verdict.gates if gate.role == "primary"}
    if "FAIL" in primary:
        return {"FAIL"}
    if "SKIPPED" in primary:
        return {"INCONCLUSIVE", "FAIL"}
    if "INCONCLUSIVE" in primary:
        open_ = [gate.id for gate in verdict.gates if gate.role == "primary" and gate.verdict == "INCONCLUSIVE"]
        warned = all(any(warning.startswith(f"{name}: ") for warning in verdict.warnings) for name in open_)
        return {"INCONCLUSIVE", "FAIL", "PASS"} if warned else {"INCONCLUSIVE", "FAIL"}
    if any(gate.verdict == "FAIL" for gate in verdict.gates):
        return {"PASS", "FAIL"}
    return {"PASS"}


def _until(gate: GateResult) -> datetime.date | None:
    """The last day of a gate's waiver, as `Waiver` writes it."""
    words = (gate.waiver or "").removeprefix("until ").partition(":")[0]
    try:
        return datetime.date.fromisoformat(words)
    except ValueError:
        return None

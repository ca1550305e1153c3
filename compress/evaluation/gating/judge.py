"""From one measure to one answer, and from several secondary answers to those that stand together. Free of torch.

PASS means that the loss is surely within the limit, FAIL that it is surely beyond, INCONCLUSIVE that the data cannot
tell. Bounds are compared as computed, never rounded.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence

from compress.evaluation.gating.kinds import Gate
from compress.evaluation.gating.power import power_of
from compress.evaluation.gating.waivers import Waiver, waiver_of
from compress.evaluation.measures import Measure, Skipped
from compress.evaluation.verdict import GateOutcome, GateResult


def judge(gate: Gate, found: Measure, alpha: float, baseline: str = "baseline") -> GateResult:
    """The verdict of one measure. What is not a number fails."""
    low, high = found.bounds(alpha)
    rule = "at most" if found.below else "at least"
    span = _span(found, low, high)
    power = power_of(found, alpha)
    verdict: GateOutcome
    if math.isnan(found.estimate) or math.isnan(low) or math.isnan(high):
        verdict, message = "FAIL", "the measure is not a number"
    elif found.inside(alpha):
        verdict, message = "PASS", f"{span} is within the limit: {rule} {found.limit:g}"
    elif found.outside(alpha):
        verdict, message = "FAIL", f"{span} is beyond the limit: {rule} {found.limit:g}"
    else:
        verdict = "INCONCLUSIVE"
        message = f"{span} straddles the limit ({rule} {found.limit:g}): {power or 'measure more'}"
    return GateResult(
        id=gate.id if found.part is None else f"{gate.id}:{found.part}",
        kind=_kind(gate),
        role=gate.role,
        verdict=verdict,
        estimate=_finite(found.estimate),
        low=_finite(low),
        high=_finite(high),
        limit=found.limit,
        rule="at most" if found.below else "at least",
        unit=found.unit,
        message=message + (f"; {found.note}" if found.note else ""),
        baseline=baseline,
        subject=found.subject,
        p_value=None if verdict == "FAIL" and _finite(found.estimate) is None else found.p_value(),
        power=power,
    )


def skipped(gate: Gate, why: Skipped, baseline: str) -> GateResult:
    """The result of a gate that was not measured."""
    return GateResult(
        id=gate.id,
        kind=_kind(gate),
        role=gate.role,
        verdict="SKIPPED",
        estimate=None,
        low=None,
        high=None,
        limit=None,
        rule="at least",
        unit="",
        message=f"not measured: {why.reason}",
        baseline=baseline,
        subject=why.subject,
    )


def holm_secondary(results: Sequence[GateResult], alpha: float) -> list[GateResult]:
    """Secondary failures that remain when all secondary gates are tested together (Holm 1979); others are open.

    Each gate alone may be wrong with probability alpha; of twenty, one would be on average. Primary gates need no such
    correction, because all of them have to pass (an intersection-union test, Berger 1982).
    """
    from compress.evaluation.statistics import holm

    family = {r.id: r.p_value for r in results if r.role == "secondary" and r.p_value is not None}
    rejected = holm(family, alpha) if family else {}
    return [_corrected(result, rejected, len(family)) for result in results]


def _corrected(result: GateResult, rejected: Mapping[str, bool], family: int) -> GateResult:
    if result.verdict != "FAIL" or rejected.get(result.id, True):
        return result
    message = f"{result.message}; not so once all {family} secondary gates are tested together (Holm)"
    return result.model_copy(update={"verdict": "INCONCLUSIVE", "message": message})


def apply_waivers(
    results: Sequence[GateResult], waivers: Sequence[Waiver], today: datetime.date
) -> tuple[list[GateResult], list[str]]:
    """Failures and open questions excused by a waiver that holds; what an expired one covers fails. And warnings."""
    judged, warnings = [], []
    for result in results:
        waiver = waiver_of(waivers, result.id.split(":")[0])
        if waiver is None:
            judged.append(result)
        elif result.verdict == "PASS":
            warnings.append(f"{result.id}: passes, so its waiver ({waiver}) can go")
            judged.append(result)
        elif waiver.holds(today):
            warnings.append(f"{result.id}: {result.verdict}, waived {waiver}")
            message = f"{result.verdict}: {result.message}"
            judged.append(result.model_copy(update={"verdict": "WAIVED", "waiver": str(waiver), "message": message}))
        else:
            message = f"its waiver has expired ({waiver}); {result.message}"
            judged.append(result.model_copy(update={"verdict": "FAIL", "waiver": str(waiver), "message": message}))
    return judged, warnings


def _span(found: Measure, low: float, high: float) -> str:
    if found.exact:
        return f"{found.estimate:.4g} {found.unit}"
    return f"{found.estimate:.4g} ({low:.4g} to {high:.4g}) {found.unit}"


def _kind(gate: Gate) -> str:
    return str(gate.kind)  # type: ignore[attr-defined]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

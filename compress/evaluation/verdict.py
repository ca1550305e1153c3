"""From measures to a verdict: three-valued, with the reasons. Free of torch.

PASS means that the loss is surely within the limit, FAIL that it is surely beyond, INCONCLUSIVE that the data cannot
tell. All primary gates have to pass (an intersection-union test, so the risk of a false pass stays at alpha without
correction). Bounds are compared as computed, never rounded.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from compress.evaluation.measures import Comparison, Measure, measure
from compress.evaluation.policy import GateSpec, Policy, Role
from compress.evaluation.records import DataRecord, EnvironmentRecord, ModelRecord

Outcome = Literal["PASS", "FAIL", "INCONCLUSIVE"]
EXIT_CODES: dict[str, int] = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class GateResult(_Record):
    """One gate: what was measured, between which one-sided bounds, against which limit, and why the verdict is so.

    Numbers that are not finite are None; `high` is also None where no upper bound is known.
    """

    id: str
    kind: str
    role: Role
    verdict: Outcome
    estimate: float | None
    low: float | None
    high: float | None
    limit: float
    rule: Literal["at most", "at least"]
    message: str


class Verdict(_Record):
    """The gate's answer. `verdict` is the outcome after the policy's `on_inconclusive`; `warnings` did not block."""

    schema_version: Literal[1] = 1
    kind: Literal["compress.verdict"] = "compress.verdict"
    verdict: Outcome
    policy: str
    policy_sha256: str
    alpha: float
    candidate: ModelRecord
    baseline: ModelRecord
    data: DataRecord
    environment: EnvironmentRecord
    gates: list[GateResult]
    warnings: Annotated[list[str], Field(default_factory=list)]

    @property
    def exit_code(self) -> int:
        """0 passed, 1 failed, 3 inconclusive."""
        return EXIT_CODES[self.verdict]


def decide(comparison: Comparison, policy: Policy, data: DataRecord, environment: EnvironmentRecord) -> Verdict:
    """Holds a comparison against a policy; raises IntegrityError if it lacks what a gate needs."""
    results = [judge(gate, measure(gate, comparison, policy.alpha)) for gate in policy.gate]
    primary = {result.verdict for result in results if result.role == "primary"}
    warnings = [f"{r.id}: {r.message}" for r in results if r.role == "secondary" and r.verdict != "PASS"]
    outcome: Outcome = "PASS"
    if "FAIL" in primary:
        outcome = "FAIL"
    elif "INCONCLUSIVE" in primary:
        if policy.on_inconclusive == "warn":
            warnings += [f"{r.id}: {r.message}" for r in results if r.role == "primary" and r.verdict != "PASS"]
        else:
            outcome = "FAIL" if policy.on_inconclusive == "fail" else "INCONCLUSIVE"
    return Verdict(
        verdict=outcome,
        policy=policy.name,
        policy_sha256=policy.sha256(),
        alpha=policy.alpha,
        candidate=comparison.candidate,
        baseline=comparison.baseline,
        data=data,
        environment=environment,
        gates=results,
        warnings=warnings,
    )


def judge(gate: GateSpec, found: Measure) -> GateResult:
    """The verdict of one gate. What is not a number fails."""
    low, high = found.low, math.inf if found.high is None else found.high
    if found.below:
        inside, outside = high <= found.limit, low > found.limit
    else:
        inside, outside = low >= found.limit, high < found.limit
    rule: Literal["at most", "at least"] = "at most" if found.below else "at least"
    span = f"{found.estimate:.4g} ({low:.4g} to {high:.4g})"
    verdict: Outcome
    if math.isnan(found.estimate) or math.isnan(low) or math.isnan(high):
        verdict, message = "FAIL", "the measure is not a number"
    elif inside:
        verdict, message = "PASS", f"{span} is within the limit: {rule} {found.limit:g}"
    elif outside:
        verdict, message = "FAIL", f"{span} is beyond the limit: {rule} {found.limit:g}"
    else:
        verdict, message = "INCONCLUSIVE", f"{span} straddles the limit ({rule} {found.limit:g}): score more tokens"
    return GateResult(
        id=gate.id,
        kind=gate.kind,
        role=gate.role,
        verdict=verdict,
        estimate=_finite(found.estimate),
        low=_finite(found.low),
        high=_finite(high),
        limit=found.limit,
        rule=rule,
        message=message,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

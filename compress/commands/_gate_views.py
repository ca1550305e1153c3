"""What `compress gate` shows: a verdict, a plan, a noise floor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.commands._command import Outcome
from compress.commands._output import View, number

if TYPE_CHECKING:
    from compress.evaluation.gating.noise_record import NoiseRecord
    from compress.evaluation.gating.plan import GatePlan, PlanRow
    from compress.evaluation.verdict import GateResult, Verdict

OUTCOMES = {"PASS": Outcome.OK, "FAIL": Outcome.GATE_FAILED, "INCONCLUSIVE": Outcome.INCONCLUSIVE}
SIZES = (100, 200, 500, 1000, 2000, 5000, 10000)
DECIDABLE = {True: "yes", False: "NO", None: "depends"}


def show_verdict(verdict: Verdict, view: View) -> None:
    """The table of gates on stderr; the reasons and the verdict, or the JSON document, on stdout."""
    verdict_table(verdict, view)
    if verdict.noise is not None or verdict.against_itself:
        view.note(f"noise floor: {verdict.noise_floor()}")
    reasons = [_reason(r) for r in verdict.gates if r.verdict != "PASS"]
    view.result(verdict.model_dump(mode="json"), [*reasons, verdict.verdict])
    for warning in verdict.warnings:
        view.warn(warning)


def verdict_table(verdict: Verdict, view: View) -> None:
    """A row for every gate: what was measured, between which bounds, against which limit."""
    several = len(verdict.baselines) > 1
    rows = [
        (
            f"{r.id} ({r.baseline})" if several else r.id,
            r.role,
            number(r.estimate),
            "-" if r.estimate is None else f"{number(r.low)} to {number(r.high)}",
            "-" if r.limit is None else f"{r.rule} {r.limit:g}",
            r.verdict,
        )
        for r in verdict.gates
    ]
    against = " and ".join(model.name for model in verdict.baselines.values())
    title = f"{verdict.candidate.name} against {against}, policy {verdict.policy}"
    title += f", profile {verdict.profile}" if verdict.profile else ""
    title += f", look {verdict.look} of {verdict.looks}" if verdict.looks > 1 else ""
    view.table(title, ("GATE", "ROLE", ">ESTIMATE", "BOUNDS", "LIMIT", "VERDICT"), rows)


def show_plan(plan: GatePlan, view: View) -> None:
    """What a policy can decide; refuses (UserError) one that cannot be decided after its table was shown."""
    from compress.evaluation.gating.plan import FLIPS, power_table

    rows = [
        (
            row.gate,
            row.role,
            _count(row.has, row.counted),
            _count(row.needs, row.counted),
            DECIDABLE[row.decidable],
            row.message,
        )
        for row in plan.rows
    ]
    title = f"policy {plan.policy}" + (f", profile {plan.profile}" if plan.profile else "")
    title += f": one-sided alpha {plan.alpha:.3g}, power {plan.power:.0%}"
    view.table(title, ("GATE", "ROLE", ">HAS", ">NEEDS", "DECIDABLE", "WHY"), rows)
    if any(row.kind == "accuracy_paired" for row in plan.rows):
        sizes = sorted({*SIZES, *(row.has for row in plan.rows if row.counted == "items" and row.has)})
        table = power_table(sizes, plan.alpha)
        columns = ("ITEMS", *(f">FLIPS {share:.0%}" for share in FLIPS))
        shown = [(f"{size:,}", *(f"{drops[share]:.2f}" for share in FLIPS)) for size, drops in table]
        view.table("smallest true loss, in points, that so many items show", columns, shown)
    plan.require_decidable()
    view.result({"policy": plan.policy, "profile": plan.profile, "alpha": plan.alpha, "power": plan.power,
                 "gates": plan.rows}, [_planned(row) for row in plan.rows])  # fmt: skip


def show_noise(noise: NoiseRecord, view: View) -> None:
    """What a model loses against itself."""
    rows = [(name, f"{v.estimate:.3g}", f"{v.low:.3g} to {v.high:.3g}") for name, v in noise.values.items()]
    view.table(f"{noise.model} against itself: {noise.variation}", ("MEASURE", ">ESTIMATE", "FLOOR"), rows)


def _reason(result: GateResult) -> str:
    return f"{result.verdict}: {result.id}: {result.message}"


def _planned(row: PlanRow) -> str:
    return f"{row.gate}: {DECIDABLE[row.decidable]}: {row.message}"


def _count(value: int | None, counted: str) -> str:
    return "-" if value is None else f"{value:,} {counted}"

"""The plan: what data can decide is told before anything is scored, and a policy that cannot be decided is refused."""

from __future__ import annotations

from typing import Any

import pytest

from compress.errors import UserError
from compress.evaluation.gate import plan_gate
from compress.evaluation.gating.comparable import compare
from compress.evaluation.gating.decide import decide
from compress.evaluation.gating.plan import GatePlan, plan, power_table
from compress.evaluation.gating.power import without_hits
from compress.evaluation.policy import Policy
from compress.evaluation.statistics import agresti_min, pairs_of
from tests.evaluation.gate_records import answers, record, task, text

KL = {"id": "kl", "kind": "kl_mean", "max": 0.0205}


def policy(*gates: dict[str, Any], **changed: Any) -> Policy:
    return Policy.model_validate({"version": 1, "gate": [*gates, KL], **changed})


def accuracy(margin: float = 1.0, **changed: Any) -> dict[str, Any]:
    return {"id": "task", "kind": "accuracy_paired", "task": "task", "margin": margin, **changed}


def row(found: GatePlan, gate: str) -> Any:
    return next(each for each in found.rows if each.gate == gate)


def test_a_margin_that_the_items_cannot_prove_is_refused() -> None:
    found = plan(policy(accuracy(1.0)), items=lambda task: 500)
    message = row(found, "task").message
    assert row(found, "task").decidable is False
    assert "for 1 point at flips 5%; has 500" in message
    assert row(found, "task").needs == pytest.approx(3092, rel=0.05)  # (1.645 + 0.842)^2 0.05 / 0.01^2, a little more
    with pytest.raises(UserError, match="cannot be decided: task: needs 3,"):
        found.require_decidable()


@pytest.mark.parametrize(
    "gate",
    [accuracy(3.0), accuracy(1.0, flips=0.002), accuracy(1.0, role="secondary"), accuracy(3.0, items=500)],
)
def test_what_can_be_decided_or_does_not_block_is_not_refused(gate: dict[str, Any]) -> None:
    plan(policy(gate), items=lambda task: 500).require_decidable()


def test_a_gate_that_asks_for_fewer_items_has_fewer() -> None:
    found = plan(policy(accuracy(3.0, items=100)), items=lambda task: 5000)
    assert (row(found, "task").has, row(found, "task").decidable) == (100, False)


def test_flips_that_the_gate_forbids_itself_are_refused() -> None:
    found = plan(policy(accuracy(3.0, flips=0.05, max_flips=0.04)), items=lambda task: 5000)
    with pytest.raises(UserError, match="expects flips of 5% and allows 4%"):
        found.require_decidable()


def test_looks_cost_items() -> None:
    once = plan(policy(accuracy()), items=lambda task: 5000)
    thrice = plan(policy(accuracy(), on_inconclusive="extend", looks=3), items=lambda task: 5000)
    assert thrice.alpha < once.alpha == 0.05
    assert row(thrice, "task").needs > row(once, "task").needs


def test_unknown_sizes_are_not_refused() -> None:
    found = plan(policy(accuracy()))
    assert row(found, "task").decidable is None
    assert row(found, "kl").decidable is None
    found.require_decidable()


def test_prompts_are_counted_at_their_best() -> None:
    gate = {"id": "loops", "kind": "degenerate", "max": 0.05}
    assert without_hits(0.05, 0.05) == 59  # 0.95^59 = 0.0485
    assert row(plan(policy(gate), prompts=40), "loops").decidable is False
    assert row(plan(policy(gate), prompts=59), "loops").decidable is True
    never = {"id": "same", "kind": "generation_identical", "min": 1.0}
    assert row(plan(policy(never), prompts=10_000), "same").decidable is False


def test_the_promised_items_are_enough() -> None:
    """With the items that it asks for, and half of the flips each way, the gate passes; with a third it does not."""
    needs = row(plan(policy(accuracy(2.0, flips=0.1)), items=lambda task: 1), "task").needs

    def passes(items: int) -> bool:
        half = round(items * 0.05)
        flips = [(1, 0)] * half + [(0, 1)] * half
        pairs = pairs_of(
            [a for a, _ in flips] + [1] * (items - 2 * half), [b for _, b in flips] + [1] * (items - 2 * half)
        )
        return agresti_min(pairs, 0.9).low > -0.02

    assert passes(needs)
    assert not passes(needs // 3)


def test_a_scored_candidate_is_planned_by_what_was_seen() -> None:
    scored = compare(record(tasks=[task(350, 140, 6, 4)], generation=answers(40, 0, 0), texts=[text(kl=0.0204)]))
    rules = policy(accuracy(1.0), {"id": "size", "kind": "size_ratio", "min": 1.0})
    found = plan(rules, comparisons={"baseline": scored})
    assert row(found, "size").decidable is True
    assert "has 500" in row(found, "task").message
    assert row(found, "kl").decidable is False
    assert row(found, "kl").needs > row(found, "kl").has == 64_000
    with pytest.raises(UserError, match="cannot be decided"):
        found.require_decidable()
    assert decide({"baseline": scored}, rules).verdict == "INCONCLUSIVE"
    clear = compare(record(tasks=[task(3500, 1400, 6, 4)]))
    plan(rules, comparisons={"baseline": clear}).require_decidable()
    assert decide({"baseline": clear}, rules).verdict == "PASS"


def test_a_task_at_chance_level_is_refused() -> None:
    scored = compare(record(tasks=[task(250, 750, 0, 0, why_not="not above chance")]))
    with pytest.raises(UserError, match="would be skipped: not above chance"):
        plan(policy(accuracy()), comparisons={"baseline": scored}).require_decidable()


def test_the_power_table_is_that_of_the_formula() -> None:
    table = dict(power_table([1000, 4000], 0.05))
    assert table[1000][0.05] == pytest.approx(1.8, abs=0.05)  # (1.645 + 0.842) sqrt(0.05 / 1000) in points
    assert table[4000][0.05] == pytest.approx(table[1000][0.05] / 2, rel=0.02)


def test_the_default_policy_can_be_planned_without_anything() -> None:
    plan_gate().require_decidable()

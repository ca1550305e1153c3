"""The plan: what data can decide is told before anything is scored, and a policy that cannot be decided is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
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


SHARES = [
    ({"id": "tail", "kind": "kl_p999", "max": 0.5}, 2995),  # log 0.05 / log 0.999
    ({"id": "tail", "kind": "top1_agreement", "min": 0.999}, 2995),
    ({"id": "tail", "kind": "top1_agreement", "min": 0.99, "confident": True}, 299),
]


@pytest.mark.parametrize(("gate", "needs"), SHARES)
def test_shares_of_too_few_tokens_are_refused(gate: dict[str, Any], needs: int) -> None:
    few = plan(policy(gate), tokens=lambda text: needs - 1)
    assert (row(few, "tail").has, row(few, "tail").needs, row(few, "tail").decidable) == (needs - 1, needs, False)
    with pytest.raises(UserError, match=f"cannot be decided: tail: needs {needs:,} tokens .* has {needs - 1:,}"):
        few.require_decidable()
    plan(policy(gate), tokens=lambda text: needs).require_decidable()
    plan(policy({**gate, "role": "secondary"}), tokens=lambda text: 1).require_decidable()


def test_no_tokens_prove_that_all_agree() -> None:
    never = {"id": "all", "kind": "top1_agreement", "min": 1.0}
    with pytest.raises(UserError, match="no number of tokens"):
        plan(policy(never), tokens=lambda text: 10**9).require_decidable()


def test_tokens_of_a_policy_on_a_text_are_counted() -> None:
    assert row(plan_gate(policy(max_tokens=6000)), "kl").has == 6000
    tail = {"id": "tail", "kind": "kl_p999", "max": 0.5}
    with pytest.raises(UserError, match=r"tail: needs 2,995 tokens .* has 2,900"):
        plan_gate(policy(tail, max_tokens=2900)).require_decidable()


def test_a_text_of_too_few_windows_is_refused() -> None:
    with pytest.raises(UserError, match=r"leaves at most 3 windows of 512 .* needs 5"):
        plan_gate(policy(max_tokens=1600))
    with pytest.raises(UserError, match=r"windows of 64 .* needs 33"):
        plan_gate(policy(max_tokens=1600, seq_len=64))
    plan_gate(policy(max_tokens=2555)).require_decidable()
    plan_gate(policy(max_tokens=33 * 63, seq_len=64)).require_decidable()


def test_short_documents_make_more_windows(tmp_path: Path) -> None:
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps({"text": f"{i} " + "a tale " * 30}) + "\n" for i in range(40)))
    plan_gate(policy(max_tokens=1600, data=str(many))).require_decidable()
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"text": f"{i} " + "a tale " * 60}) + "\n" for i in range(20)))
    plan_gate(policy(max_tokens=1600, data=str(few))).require_decidable()


NOT_IN_SMOKE = [
    ({"id": "g", "kind": "speed_ratio", "min": 1.0}, "speed and memory"),
    ({"id": "g", "kind": "load_time", "max": 1.0}, "speed and memory"),
    ({"id": "g", "kind": "generation_identical", "min": 0.5}, "generated answers"),
    ({"id": "g", "kind": "degenerate", "max": 0.5}, "generated answers"),
    ({"id": "g", "kind": "kl_mean", "max": 0.5, "text": "wikitext-2"}, "the text 'wikitext-2'"),
]


@pytest.mark.parametrize("role", ["primary", "secondary"])
@pytest.mark.parametrize(("gate", "what"), NOT_IN_SMOKE)
def test_a_gate_on_what_the_suite_does_not_score_is_refused(gate: dict[str, Any], what: str, role: str) -> None:
    with pytest.raises(UserError, match=f"the gate g is about {re.escape(what)}.*'smoke' does not score"):
        plan_gate(policy({**gate, "role": role}, suite="smoke"))
    plan_gate(policy({**gate, "role": role}, suite="nightly"))


def test_a_suite_with_its_texts_is_planned() -> None:
    named = {"id": "named", "kind": "kl_mean", "max": 0.5, "text": "tales_heldout"}
    found = plan_gate(policy(named, suite="smoke"))
    assert row(found, "kl").has == row(found, "named").has == 16384
    found.require_decidable()


def test_the_default_policy_can_be_planned_without_anything() -> None:
    plan_gate().require_decidable()

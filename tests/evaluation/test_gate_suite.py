"""Policies that name a suite: scored with it, refused with another, planned from its items."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress import content
from compress.errors import IntegrityError, UserError
from compress.evaluation.evaluate import evaluate
from compress.evaluation.gate import gate, measure_floor, plan_gate
from compress.evaluation.policy import Policy
from compress.evaluation.records import write_record
from compress.evaluation.scope import resolve

SUITE = """
version = 1
[[text]]
name = "{text}"
max_tokens = 4200
[[task]]
name = "blimp"
items = 4
[generation]
prompts = 2
max_tokens = 4
"""


@pytest.fixture
def suite(tmp_path: Path, text: Path) -> Path:
    pytest.importorskip("lm_eval")
    path = tmp_path / "mine.toml"
    path.write_text(SUITE.format(text=text))
    return path


def policy(suite: Path, **changed: object) -> Policy:
    gates = [
        {"id": "kl", "kind": "kl_mean", "max": 100.0},
        {"id": "blimp", "kind": "accuracy_paired", "task": "blimp", "margin": 90.0, "role": "secondary"},
        {"id": "loops", "kind": "degenerate", "max": 1.0, "role": "secondary"},
    ]
    return Policy.model_validate({"version": 1, "suite": str(suite), "gate": gates, **changed})


def test_a_policy_scores_its_suite(damaged: Path, tiny: Path, suite: Path, tmp_path: Path) -> None:
    verdict = gate(damaged, tiny, policy(suite), device="cpu")
    answers = {g.id: g.verdict for g in verdict.gates}
    assert answers["kl"] == answers["loops"] == "PASS"
    assert answers["blimp"] == "SKIPPED"  # a model of random weights is at chance level
    assert verdict.exit_code == 0
    other = tmp_path / "other.json"
    smaller = suite.with_name("mine2.toml")
    smaller.write_text(
        suite.read_text().replace("items = 4", "items = 3").replace("[generation]\nprompts = 2\nmax_tokens = 4", "")
    )
    write_record(evaluate(damaged, tiny, suite=smaller, device="cpu"), other)
    with pytest.raises(IntegrityError, match=r"hold for the suite 'mine'.*the suite 'mine2'"):
        gate(other, policy=policy(suite))
    suite.write_text(suite.read_text().replace("4200", "4300"))
    write_record(evaluate(damaged, tiny, suite=smaller, device="cpu"), other)
    smaller.write_text(smaller.read_text().replace("4200", "4300"))
    with pytest.raises(IntegrityError, match="as it was then"):
        gate(other, policy=policy(smaller))


def test_a_plan_counts_the_items_of_the_suite(suite: Path) -> None:
    plan = plan_gate(policy(suite))
    rows = {row.gate: row for row in plan.rows}
    assert (rows["blimp"].has, rows["loops"].has) == (4, 2)
    tight = [{"id": "blimp", "kind": "accuracy_paired", "task": "blimp", "margin": 1.0}]
    with pytest.raises(UserError, match=r"needs 3,\d+ items for 1 point at flips 5%; has 4"):
        plan_gate(policy(suite, gate=tight)).require_decidable()
    elsewhere = [{"id": "a", "kind": "accuracy_paired", "task": "boolq", "margin": 1.0}]
    with pytest.raises(UserError, match="'boolq', which the suite"):
        plan_gate(policy(suite, gate=elsewhere))


def test_whole_tasks_are_counted_from_their_data(suite: Path) -> None:
    suite.write_text(suite.read_text().replace('name = "blimp"\nitems = 4', 'name = "tales_cloze"'))
    gates = [{"id": "cloze", "kind": "accuracy_paired", "task": "tales_cloze", "margin": 50.0}]
    lines = content.eval_dir().joinpath("data", "cloze.jsonl").read_text(encoding="utf-8").splitlines()
    assert plan_gate(policy(suite, gate=gates)).rows[0].has == len(lines) > 100
    assert resolve(suite).suite.tasks[0].items is None


def test_the_noise_floor_covers_the_suite(tiny: Path, suite: Path) -> None:
    suite.write_text(suite.read_text().replace("4200", "2600"))
    noise = measure_floor(tiny, policy(suite), device="cpu")
    assert {"kl_mean", "flips:blimp", "generation_differs"} <= set(noise.values)
    assert noise.values["flips:blimp"].estimate == 0.0

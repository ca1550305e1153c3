"""How often the gate errs, by simulation: on the limit it passes at most alpha of the time, however often it looks."""

from __future__ import annotations

import numpy as np
import pytest

from compress.evaluation.gating.comparison import PairedTask
from compress.evaluation.gating.decide import alpha_per_look
from compress.evaluation.gating.kinds import AccuracyPaired
from compress.evaluation.gating.measure_task import measure as measure_task
from compress.evaluation.gating.measure_text import _ratio
from compress.evaluation.gating.scoring import FEWEST_BLOCKS
from compress.evaluation.measures import Measure
from compress.evaluation.policy import Policy
from tests.evaluation.gate_records import task

LIMIT = 0.02
CLUSTERS, TOKENS = 42, 2000


def policy(on_inconclusive: str, looks: int = 3) -> Policy:
    gate = [{"id": "kl", "kind": "kl_mean", "max": LIMIT}]
    return Policy.model_validate({"version": 1, "gate": gate, "on_inconclusive": on_inconclusive, "looks": looks})


def passes(sums: np.ndarray, rules: Policy) -> bool:
    """Whether the KL of a candidate is passed at one of the looks at growing data, the limit being its true mean."""
    looks = rules.looks if rules.on_inconclusive == "extend" else 1
    alpha = alpha_per_look(rules)
    for size in sorted({max(FEWEST_BLOCKS, round(CLUSTERS * look / looks)) for look in range(1, looks + 1)}):
        seen = sums[:size]
        estimate, bounds = _ratio("t", seen.tolist(), [TOKENS] * len(seen), 0)
        found = Measure(estimate, bounds, LIMIT, True, "nats")
        if found.inside(alpha):
            return True
        if found.outside(alpha):
            return False
    return False


def false_passes(rules: Policy, runs: int) -> float:
    """Share of candidates with a true KL of exactly the limit that pass; their cluster means lean, as KL does."""
    random = np.random.default_rng(7)
    sums = TOKENS * LIMIT * random.gamma(16.0, 1 / 16, size=(runs, CLUSTERS))
    return float(np.mean([passes(row, rules) for row in sums]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("on_inconclusive", "looks"), [("fail", 2), ("extend", 2), ("extend", 3), ("extend", 5), ("extend", 10)]
)
def test_a_candidate_on_the_limit_passes_at_most_alpha_of_the_time(on_inconclusive: str, looks: int) -> None:
    assert false_passes(policy(on_inconclusive, looks), 10_000) <= 0.05 + 0.015


def test_looking_thrice_without_spending_alpha_would_err(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation sees the difference that spending alpha makes."""
    rules = policy("extend", 5)
    spent = false_passes(rules, 1500)
    monkeypatch.setattr(f"{__name__}.alpha_per_look", lambda rules: rules.alpha)
    careless = false_passes(rules, 1500)
    assert spent <= 0.065
    assert careless > 0.08


@pytest.mark.slow
@pytest.mark.parametrize(("items", "flips"), [(300, 0.06), (1000, 0.1)])
def test_accuracy_that_lies_on_the_margin_passes_at_most_alpha_of_the_time(items: int, flips: float) -> None:
    margin = 0.03
    random = np.random.default_rng(11)
    gate = AccuracyPaired(id="g", kind="accuracy_paired", task="task", margin=100 * margin)
    wrong, right = (flips + margin) / 2, (flips - margin) / 2
    seen: dict[tuple[int, int], bool] = {}
    passed = 0
    for lost, won, _ in random.multinomial(items, [wrong, right, 1 - flips], size=10_000):
        key = (int(lost), int(won))
        if key not in seen:
            paired = task(items - key[0] - key[1], 0, *key)
            found = measure_task(gate, PairedTask(paired, list(paired.correct_baseline or []), None))
            assert isinstance(found, list)
            seen[key] = found[0].inside(0.05)
        passed += seen[key]
    assert passed / 10_000 <= 0.05 + 0.015

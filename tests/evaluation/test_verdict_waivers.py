"""Waivers: what they excuse, until when, and that an expired one fails."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from compress.evaluation.gating.decide import decide
from compress.evaluation.gating.kinds import KlMean, KlP999, SizeRatio
from compress.evaluation.policy import Policy
from compress.evaluation.verdict import Verdict
from tests.evaluation.gate_records import comparison

TODAY = datetime.date(2026, 3, 31)
KL = KlMean(id="kl", kind="kl_mean", max=0.0195)
SIZE = SizeRatio(id="size", kind="size_ratio", min=2.0)


def judged(until: str, *gates: Any, waived: str = "kl", **changed: Any) -> Verdict:
    waiver = {"gate": waived, "until": datetime.date.fromisoformat(until), "reason": "issue 42"}
    values = {"version": 1, "gate": [g.model_dump() for g in gates or (KL, SIZE)], "waiver": [waiver], **changed}
    return decide({"baseline": comparison()}, Policy.model_validate(values), today=TODAY)


@pytest.mark.parametrize(
    ("until", "outcome", "code"),
    [("2026-12-31", "WAIVED", 0), ("2026-03-31", "WAIVED", 0), ("2026-03-30", "FAIL", 1), ("2020-01-01", "FAIL", 1)],
)
def test_a_waiver_holds_to_its_last_day(until: str, outcome: str, code: int) -> None:
    verdict = judged(until)
    result = verdict.gates[0]
    assert (result.verdict, verdict.exit_code) == (outcome, code)
    assert result.waiver == f"until {until}: issue 42"
    if outcome == "WAIVED":
        assert result.message.startswith("FAIL: ")
        assert "waived until 2026-12-31: issue 42" in verdict.warnings[0] or until == "2026-03-31"
    else:
        assert "expired" in result.message


def test_an_expired_waiver_fails_what_is_only_open() -> None:
    open_ = KlMean(id="kl", kind="kl_mean", max=0.0201)
    assert judged("2026-12-31", open_, SIZE).exit_code == 0
    assert judged("2026-01-01", open_, SIZE).exit_code == 1
    assert judged("2026-01-01", open_, SIZE, on_inconclusive="warn").exit_code == 1


def test_a_waiver_covers_its_gate_only() -> None:
    other = KlP999(id="tail", kind="kl_p999", max=0.09)
    verdict = judged("2026-12-31", KL, other)
    assert [g.verdict for g in verdict.gates] == ["WAIVED", "FAIL"]
    assert verdict.exit_code == 1


def test_a_waiver_that_is_not_needed_is_mentioned_and_harmless() -> None:
    for until in ("2026-12-31", "2020-01-01"):
        verdict = judged(until, waived="size", gate=[SIZE.model_dump()])
        assert verdict.exit_code == 0
        assert verdict.gates[0].verdict == "PASS"
        assert "can go" in verdict.warnings[0]

"""Trends: ten small losses that pass ten gates are flagged, noise is not, and nothing is compared across machines."""

from __future__ import annotations

import numpy as np
import pytest

from compress.evaluation.reports.history import HistoryLine, line_of
from compress.evaluation.reports.trend import Trend, trend
from compress.evaluation.reports.trend_document import gates_table, trend_document, trend_svg
from compress.evaluation.verdict import GateResult
from tests.evaluation.gate_records import environment, model, text
from tests.evaluation.reports.made import accuracy, gate, verdict

DIGITS = "0123456789"


def digest(number: int) -> str:
    return f"{number:064x}"


def run(number: int, *gates: GateResult, baseline: int = 0, release: str | None = None, machine: str = "x86_64",
        tokens: str = "2" * 64) -> HistoryLine:  # fmt: skip
    """The run of candidate `number` against the model `baseline`."""
    candidate = model("candidate", 400).model_copy(update={"digest": digest(number)})
    root = model("base", 1000).model_copy(update={"digest": digest(baseline)})
    names = {each.baseline for each in gates}
    made = verdict(
        *gates,
        candidate=candidate,
        baselines=dict.fromkeys(names, root),
        environment=environment(machine=machine),
        texts=[text().data.model_copy(update={"windows_sha256": tokens})],
    )
    return line_of(made, f"commit{number:04}", release)


def falling(steps: int = 10, drop: float = 0.3, half: float = 0.9, margin: float = 5.0) -> list[HistoryLine]:
    """Accuracy against one baseline, lower by `drop` points at each run; every gate passes."""
    return [run(i, accuracy("lambada", -drop * i, margin, half), baseline=999) for i in range(1, steps + 1)]


def chained(steps: int = 10, drop: float = 0.3, half: float = 0.6) -> list[HistoryLine]:
    """Each run against the one before it: `drop` points are lost every time, and the limit is 1 point."""
    return [
        run(i, accuracy("lambada", -drop, 1.0, half, baseline="last"), baseline=i - 1, release=f"v{i}")
        for i in range(1, steps + 1)
    ]


def test_ten_small_drops_against_one_model_are_flagged() -> None:
    lines = falling()
    assert all(line.verdict == "PASS" for line in lines)
    found = trend(lines)
    flags = found.gates[0].flags
    assert len(flags) == 2
    assert flags[0] == "worse than at commit00 by 2.7 points, more than the noise of both runs"
    assert flags[1].startswith("drifts: 2.7 points lost over 10 runs since commit00, 54% of the allowed loss (p ")


def test_ten_small_drops_against_the_last_release_are_flagged() -> None:
    lines = chained()
    assert all(line.verdict == "PASS" for line in lines)
    assert all(g.high is not None and g.low is not None and g.low > -1.0 for line in lines for g in line.gates)
    found = trend(lines).gates[0]
    assert (found.steps, found.total) == (10, pytest.approx(-3.0))
    assert found.flags == ("10 steps since v1 add up to 3 points, more than the limit of one (-1 points)",)


def test_candidates_between_releases_are_not_counted_twice() -> None:
    """Many commits are gated against one release; only the releases form the chain."""
    lines = []
    for i in range(1, 6):
        for attempt in range(3):
            number, last = 10 * i + attempt, 10 * (i - 1)
            step = accuracy("lambada", -0.3, 1.0, baseline="last")
            lines.append(run(number, step, baseline=last, release=f"v{i}" if attempt == 0 else None))
    found = trend(lines).gates[0]
    assert found.steps == 5
    assert found.total == pytest.approx(-1.5)


def test_perplexity_multiplies_along_the_chain_and_kl_does_not_add_up() -> None:
    def both(i: int) -> HistoryLine:
        rise = gate("ppl", kind="ppl_ratio", unit="share", estimate=0.01, low=0.005, high=0.015, limit=0.02)
        return run(i, rise, gate("kl"), baseline=i - 1, release=f"v{i}")

    found = {each.id: each for each in trend([both(i) for i in range(1, 6)]).gates}
    assert found["ppl"].total == pytest.approx(1.01**5 - 1)
    assert found["ppl"].flags == (
        "5 steps since v1 add up to 5.101 percentage points, more than the limit of one (2%)",
    )
    assert found["kl"].total is None


def test_three_steps_within_the_limit_are_no_flag() -> None:
    found = trend(chained(3)).gates[0]
    assert found.total == pytest.approx(-0.9)
    assert found.flags == ()


def test_what_stays_the_same_is_not_flagged() -> None:
    assert trend(falling(drop=0.0)).flags == []
    assert trend(chained(drop=0.0)).flags == []


def test_what_gets_better_is_not_flagged() -> None:
    assert trend(falling(drop=-0.3)).flags == []
    assert trend(chained(drop=-0.3)).flags == []


def test_noise_is_seldom_flagged() -> None:
    """Values that vary as their intervals say, without a trend: alpha bounds the drift, two runs the step."""
    rng, flagged, repeats = np.random.default_rng(5), 0, 200
    for _ in range(repeats):
        values = rng.normal(-1.0, 0.5, 10)
        lines = [run(i, accuracy("a", float(v), 5.0, 0.82), baseline=999) for i, v in enumerate(values, start=1)]
        flagged += bool(trend(lines).flags)
    assert flagged / repeats < 0.12


def test_a_drift_too_small_to_matter_is_not_flagged() -> None:
    assert trend(falling(drop=0.01)).flags == []


def test_higher_is_worse_for_a_kl() -> None:
    def kl(i: int, step: float) -> HistoryLine:
        value = 0.010 + step * i
        return run(i, gate("kl", estimate=value, low=value - 0.001, high=value + 0.001), baseline=999)

    worse = trend([kl(i, 0.0005) for i in range(10)]).gates[0]
    assert [flag.split()[0] for flag in worse.flags] == ["worse", "drifts:"]
    assert trend([kl(i, -0.0005) for i in range(10)]).flags == []


def test_the_last_release_is_what_a_run_is_compared_with() -> None:
    lines = falling(6)
    lines[1] = lines[1].model_copy(update={"release": "v1"})
    lines[3] = lines[3].model_copy(update={"release": "v2"})
    found = trend(lines).gates[0]
    assert found.since is not None
    assert found.since.line.name == "v2"
    assert found.change == pytest.approx(-0.6)
    assert found.noise == pytest.approx(0.9 * 2**0.5)
    lines[5] = lines[5].model_copy(update={"release": "v3"})
    assert trend(lines).gates[0].since == found.since


@pytest.mark.parametrize("what", ["machine", "tokens", "baseline"])
def test_only_what_is_alike_is_compared(what: str) -> None:
    """Half of the runs were made elsewhere: the drop between the two halves says nothing."""
    other = {"machine": "arm64", "tokens": "3" * 64, "baseline": 998}[what]
    subject = {"subject": "text"}
    lines = [run(i, accuracy("a", 0.0, **subject), baseline=999) for i in range(1, 6)]
    lines += [run(i, accuracy("a", -4.0, **subject), **{"baseline": 999, what: other}) for i in range(6, 11)]
    found = trend(lines).gates[0]
    assert found.flags == ()
    assert found.change == 0.0
    assert len(found.runs) == 10
    assert len(found.fixed) == 5


def test_a_gate_that_was_not_measured_has_no_trend() -> None:
    missing = gate("decode", "SKIPPED", role="secondary", estimate=None, low=None, high=None, limit=None)
    assert trend([run(1, missing, gate("kl")), run(2, missing, gate("kl"))]).gates[0].id == "kl"
    assert trend([]) == Trend((), ())


def test_an_exact_value_may_wobble_but_not_grow() -> None:
    def size(i: int, ratio: float) -> HistoryLine:
        exact = {"estimate": ratio, "low": ratio, "high": ratio, "limit": 1.0, "rule": "at least", "unit": "ratio"}
        return run(i, gate("size", kind="size_ratio", **exact), baseline=999)

    assert trend([size(1, 2.5), size(2, 2.499)]).flags == []
    flags = trend([size(1, 2.5), size(2, 1.5)]).flags
    assert flags == ["size: worse than at commit00 by 1, more than the noise of both runs"]


def test_the_report_holds_what_was_found() -> None:
    found = trend(falling())
    document = trend_document(found)
    assert document.sections[0].heading == "Flagged"
    assert document.lead == ("10 runs from 2026-11-21 to 2026-11-21, the newest commit00", "2 flagged")
    row = dict(zip([c.lstrip(">") for c in gates_table(found).columns], gates_table(found).rows[0], strict=True))
    assert row["now"] == "-3 [-3.9, -2.1] points"
    assert row["change"] == "-2.7 ± 1.273"
    assert row["flags"] == "2"
    svg = trend_svg(found)
    assert svg == trend_svg(trend(falling()))
    calm = trend_document(trend(falling(drop=0.0)))
    assert calm.sections[0].heading == "Gates"

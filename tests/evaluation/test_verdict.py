"""Three-valued decisions: each gate can pass, fail and be undecided, and nothing passes by default."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from compress.errors import IntegrityError, UserError
from compress.evaluation.gating.comparable import compare
from compress.evaluation.gating.decide import decide
from compress.evaluation.gating.judge import judge
from compress.evaluation.gating.kinds import (
    AccuracyPaired,
    BitsPerWeightMax,
    BytesMax,
    Degenerate,
    DpRms,
    DpTail,
    Gate,
    GenerationIdentical,
    KlIncrease,
    KlMean,
    KlP999,
    PplRatio,
    SizeRatio,
    Top1Agreement,
)
from compress.evaluation.measures import Measure, Skipped, measure
from compress.evaluation.policy import Policy
from compress.evaluation.verdict import Verdict, read_verdict, write_verdict
from tests.evaluation.gate_records import answers, comparison, model, record, task, text


def one(gate: Gate, **changed: Any) -> Measure:
    found = measure(gate, comparison(**changed))
    assert not isinstance(found, Skipped)
    return found[0]


def fixed(estimate: float, low: float, high: float, limit: float, below: bool = True) -> Measure:
    return Measure(estimate, lambda _: (low, high), limit, below, "nats")


GATES: list[tuple[Any, str, str]] = [
    (SizeRatio(id="g", kind="size_ratio", min=2.5), "PASS", "exactly at the limit"),
    (SizeRatio(id="g", kind="size_ratio", min=2.6), "FAIL", ""),
    (BytesMax(id="g", kind="bytes_max", max=400), "PASS", ""),
    (BytesMax(id="g", kind="bytes_max", max=399), "FAIL", ""),
    (BitsPerWeightMax(id="g", kind="bits_per_weight_max", max=3.2), "PASS", ""),
    (BitsPerWeightMax(id="g", kind="bits_per_weight_max", max=3.1), "FAIL", ""),
    (KlMean(id="g", kind="kl_mean", max=0.0205), "PASS", ""),
    (KlMean(id="g", kind="kl_mean", max=0.0201), "INCONCLUSIVE", ""),
    (KlMean(id="g", kind="kl_mean", max=0.0199), "INCONCLUSIVE", ""),
    (KlMean(id="g", kind="kl_mean", max=0.0195), "FAIL", ""),
    (KlMean(id="g", kind="kl_mean", max=0.0205, interval="bca"), "PASS", ""),
    (KlMean(id="g", kind="kl_mean", max=0.0195, interval="bca"), "FAIL", ""),
    (PplRatio(id="g", kind="ppl_ratio", max_increase=0.0210), "PASS", "exp(0.02) - 1 = 0.0202"),
    (PplRatio(id="g", kind="ppl_ratio", max_increase=0.0202), "INCONCLUSIVE", ""),
    (PplRatio(id="g", kind="ppl_ratio", max_increase=0.0195), "FAIL", ""),
    (Top1Agreement(id="g", kind="top1_agreement", min=0.895), "PASS", ""),
    (Top1Agreement(id="g", kind="top1_agreement", min=0.9), "INCONCLUSIVE", ""),
    (Top1Agreement(id="g", kind="top1_agreement", min=0.905), "FAIL", ""),
    (Top1Agreement(id="g", kind="top1_agreement", min=0.965, confident=True), "PASS", ""),
    (Top1Agreement(id="g", kind="top1_agreement", min=0.975, confident=True), "FAIL", ""),
    (KlP999(id="g", kind="kl_p999", max=0.15), "PASS", "0.05% of the tokens are above 0.15"),
    (KlP999(id="g", kind="kl_p999", max=0.12), "INCONCLUSIVE", "between the thresholds 0.1 and 0.15"),
    (KlP999(id="g", kind="kl_p999", max=0.09), "FAIL", "all tokens are above 0.1"),
    (DpRms(id="g", kind="dp_rms", max=0.022), "PASS", "root of 0.0004"),
    (DpRms(id="g", kind="dp_rms", max=0.02), "INCONCLUSIVE", ""),
    (DpRms(id="g", kind="dp_rms", max=0.018), "FAIL", ""),
    (DpTail(id="g", kind="dp_tail", max_drop=0.1, role="secondary"), "PASS", ""),
    (DpTail(id="g", kind="dp_tail", max_drop=0.09, role="secondary"), "FAIL", ""),
    (DpTail(id="g", kind="dp_tail", max_drop=0.3, percentile="0.1%", role="secondary"), "FAIL", ""),
]


@pytest.mark.parametrize(("gate", "expected", "why"), GATES)
def test_every_kind_has_its_answers(gate: Any, expected: str, why: str) -> None:
    result = judge(gate, one(gate), 0.05)
    assert result.verdict == expected, (why, result)


def accuracy(margin: float, **changed: Any) -> AccuracyPaired:
    return AccuracyPaired(id="g", kind="accuracy_paired", task="task", margin=margin, **changed)


@pytest.mark.parametrize(
    ("items", "margin", "expected"),
    [
        ((700, 280, 10, 10), 1.0, "PASS"),
        ((700, 280, 10, 10), 0.5, "INCONCLUSIVE"),
        ((700, 250, 40, 10), 1.0, "FAIL"),
        ((700, 250, 10, 40), 1.0, "PASS"),
        ((70, 28, 1, 1), 1.0, "INCONCLUSIVE"),
        ((70, 30, 0, 0), 1.0, "INCONCLUSIVE"),
        ((1400, 600, 0, 0), 1.0, "PASS"),
    ],
)
def test_accuracy_is_judged_in_points(items: tuple[int, int, int, int], margin: float, expected: str) -> None:
    gate = accuracy(margin)
    found = one(gate, tasks=[task(*items)])
    result = judge(gate, found, 0.05)
    assert result.verdict == expected, result
    assert result.estimate == pytest.approx(100 * (items[3] - items[2]) / sum(items))
    assert (result.limit, result.rule, result.unit, result.subject) == (-margin, "at least", "points", "task")
    if expected == "INCONCLUSIVE":
        assert result.power is not None
        assert f"has {sum(items):,}" in result.power


def test_clusters_widen_the_interval_of_accuracy() -> None:
    subjects = [f"subject {i // 50}" for i in range(1000)]  # the flips all lie in the last one
    turned = task(700, 260, 40, 0)
    clustered = one(accuracy(1.0), tasks=[turned.model_copy(update={"clusters": subjects})])
    assert clustered.bounds(0.05)[0] < one(accuracy(1.0), tasks=[turned]).bounds(0.05)[0]
    unmoved = task(700, 300, 0, 0).model_copy(update={"clusters": subjects})
    assert one(accuracy(1.0), tasks=[unmoved]).bounds(0.05)[0] < 0


@pytest.mark.parametrize(("limit", "expected"), [(0.08, "PASS"), (0.05, "INCONCLUSIVE"), (0.03, "FAIL")])
def test_flips_are_a_measure_of_their_own(limit: float, expected: str) -> None:
    gate = accuracy(5.0, max_flips=limit)
    found = measure(gate, comparison(tasks=[task(700, 250, 25, 25)]))
    assert not isinstance(found, Skipped)
    assert len(found) == 2
    result = judge(gate, found[1], 0.05)
    assert (result.id, result.estimate, result.verdict) == ("g:flips", 0.05, expected)


@pytest.mark.parametrize(("minimum", "expected"), [(0.5, "PASS"), (0.75, "INCONCLUSIVE"), (0.9, "FAIL")])
def test_identical_answers(minimum: float, expected: str) -> None:
    gate = GenerationIdentical(id="g", kind="generation_identical", min=minimum)
    result = judge(gate, one(gate, generation=answers(28, 0, 0)), 0.05)
    assert result.verdict == expected
    assert result.estimate == 0.7


@pytest.mark.parametrize(
    ("degenerate", "limit", "expected"), [(0, 0.1, "PASS"), (0, 0.05, "INCONCLUSIVE"), (20, 0.1, "FAIL")]
)
def test_degenerate_answers(degenerate: int, limit: float, expected: str) -> None:
    gate = Degenerate(id="g", kind="degenerate", max=limit, max_empty=0.1)
    found = measure(gate, comparison(generation=answers(28, degenerate, 0)))
    assert not isinstance(found, Skipped)
    assert judge(gate, found[0], 0.05).verdict == expected
    assert judge(gate, found[1], 0.05).verdict == "PASS"
    empty = measure(gate, comparison(generation=answers(28, 0, 20)))
    assert not isinstance(empty, Skipped)
    assert (judge(gate, empty[1], 0.05).id, judge(gate, empty[1], 0.05).verdict) == ("g:empty", "FAIL")


def test_no_degenerate_answer_proves_what_the_binomial_says() -> None:
    gate = Degenerate(id="g", kind="degenerate", max=0.1)
    _, high = one(gate, generation=answers(28, 0, 0)).bounds(0.05)
    assert high == pytest.approx(1 - 0.05 ** (1 / 40))


def test_more_noise_makes_a_pass_undecided() -> None:
    gate = KlMean(id="g", kind="kl_mean", max=0.0205)
    assert judge(gate, one(gate, texts=[text(noise=0.001)]), 0.05).verdict == "PASS"
    assert judge(gate, one(gate, texts=[text(noise=0.01)]), 0.05).verdict == "INCONCLUSIVE"


def test_agreement_without_a_miss_is_still_not_certain() -> None:
    gate = Top1Agreement(id="g", kind="top1_agreement", min=0.9999)
    perfect = one(gate, texts=[text(agree=1.0, noise=0.0)])
    assert perfect.estimate == 1.0
    assert judge(gate, perfect, 0.05).verdict == "PASS"  # 64,000 tokens without a miss: at least 0.99995
    stricter = Top1Agreement(id="g", kind="top1_agreement", min=0.99999)
    assert judge(stricter, one(stricter, texts=[text(agree=1.0, noise=0.0)]), 0.05).verdict == "INCONCLUSIVE"


@pytest.mark.parametrize("below", [True, False])
@pytest.mark.parametrize(
    "values", [(math.nan, 0.0, 0.0), (0.0, math.nan, 0.0), (0.0, 0.0, math.nan), (math.nan, math.nan, math.nan)]
)
def test_what_is_not_a_number_never_passes(values: Sequence[float], below: bool) -> None:
    gate = KlMean(id="g", kind="kl_mean", max=1.0)
    result = judge(gate, fixed(*values, 1.0 if below else -1.0, below), 0.05)
    assert result.verdict == "FAIL"


def test_an_unknown_bound_never_passes() -> None:
    gate = KlP999(id="g", kind="kl_p999", max=5.0)
    result = judge(gate, fixed(1.0, 0.5, math.inf, 5.0), 0.05)
    assert result.verdict == "INCONCLUSIVE"
    assert result.high is None
    assert judge(gate, fixed(1.0, -math.inf, math.inf, 0.5, below=False), 0.05).verdict == "INCONCLUSIVE"


def test_bounds_are_not_rounded() -> None:
    gate = KlMean(id="g", kind="kl_mean", max=0.04)
    assert judge(gate, fixed(0.04, 0.03, 0.04, 0.04), 0.05).verdict == "PASS"
    assert judge(gate, fixed(0.04, 0.03, math.nextafter(0.04, 1), 0.04), 0.05).verdict == "INCONCLUSIVE"


def test_the_p_value_is_that_of_the_t_test() -> None:
    gate = KlMean(id="g", kind="kl_mean", max=0.0198)
    sums = text().clusters
    assert sums.kl is not None
    means = [total / tokens for total, tokens in zip(sums.kl, sums.tokens, strict=True)]
    expected = stats.ttest_1samp(means, 0.0198, alternative="greater").pvalue
    assert one(gate).p_value() == pytest.approx(expected, rel=0.01)
    assert judge(gate, one(gate), 0.05).p_value == pytest.approx(expected, rel=0.01)
    assert one(SizeRatio(id="g", kind="size_ratio", min=2.5)).p_value() is None


def policy(*gates: Any, **changed: Any) -> Policy:
    return Policy.model_validate({"version": 1, "gate": [g.model_dump() for g in gates], **changed})


def pick(kind: str, verdict: str, role: str = "primary") -> Any:
    gate = next(g for g, v, _ in GATES if g.kind == kind and v == verdict)
    return gate.model_copy(update={"role": role, "id": f"{kind}-{verdict}-{role}"})


def decision(*gates: Any, **changed: Any) -> Verdict:
    return decide({"baseline": comparison()}, policy(*gates, **changed))


PASS, FAIL, OPEN = (pick("kl_mean", v) for v in ("PASS", "FAIL", "INCONCLUSIVE"))


@pytest.mark.parametrize(
    ("gates", "on_inconclusive", "expected", "code"),
    [
        ([PASS], "inconclusive", "PASS", 0),
        ([PASS, FAIL], "inconclusive", "FAIL", 1),
        ([OPEN, FAIL], "warn", "FAIL", 1),
        ([PASS, OPEN], "inconclusive", "INCONCLUSIVE", 3),
        ([PASS, OPEN], "fail", "FAIL", 1),
        ([PASS, OPEN], "warn", "PASS", 0),
        ([PASS, OPEN], "extend", "INCONCLUSIVE", 3),
        ([PASS, pick("top1_agreement", "FAIL", "secondary")], "fail", "PASS", 0),
        ([PASS, pick("top1_agreement", "INCONCLUSIVE", "secondary")], "fail", "PASS", 0),
    ],
)
def test_the_overall_verdict(gates: list[Any], on_inconclusive: str, expected: str, code: int) -> None:
    verdict = decision(*gates, on_inconclusive=on_inconclusive)
    assert (verdict.verdict, verdict.exit_code) == (expected, code)
    assert [g.id for g in verdict.gates] == [g.id for g in gates]
    undecided = [g for g in verdict.gates if g.verdict != "PASS"]
    blocking = expected != "PASS" and not any(g.role == "secondary" for g in undecided)
    assert bool(verdict.warnings) == (bool(undecided) and not blocking)


def test_a_secondary_failure_blocks_only_where_the_policy_says_so() -> None:
    secondary = pick("top1_agreement", "FAIL", "secondary")
    assert decision(PASS, secondary).exit_code == 0
    assert decision(PASS, secondary, secondary="block").exit_code == 1
    open_ = pick("top1_agreement", "INCONCLUSIVE", "secondary")
    assert decision(PASS, open_, secondary="block").exit_code == 0


def test_holm_withdraws_failures_that_many_gates_would_show_by_chance() -> None:
    """Alone each of these is beyond its limit with p just under 0.05; of twenty, one is so by chance."""
    limit = 0.02 - 0.00031
    barely = KlMean(id="barely", kind="kl_mean", max=limit, role="secondary")
    p_value = one(barely).p_value()
    assert p_value is not None
    assert 0.02 < p_value < 0.05
    alone = decision(PASS, barely)
    assert [g.verdict for g in alone.gates] == ["PASS", "FAIL"]
    others = [KlMean(id=f"fine-{i}", kind="kl_mean", max=0.03, role="secondary") for i in range(4)]
    among = decision(PASS, barely, *others, secondary="block")
    assert among.gates[1].verdict == "INCONCLUSIVE"
    assert "Holm" in among.gates[1].message
    assert among.exit_code == 0
    primary = decision(barely.model_copy(update={"role": "primary"}), *others)
    assert primary.gates[0].verdict == "FAIL"  # primary gates need no correction
    surely = KlMean(id="surely", kind="kl_mean", max=0.01, role="secondary")
    assert decision(PASS, surely, *others, secondary="block").exit_code == 1


def test_a_skipped_gate_never_passes() -> None:
    below_chance = comparison(tasks=[task(250, 750, 0, 0, why_not="not above chance")])

    def decided(**changed: Any) -> Verdict:
        return decide({"baseline": below_chance}, policy(accuracy(1.0), *changed.pop("more", []), **changed))

    only = decided(on_inconclusive="warn")
    assert (only.gates[0].verdict, only.verdict) == ("SKIPPED", "INCONCLUSIVE")
    assert "not above chance" in only.gates[0].message
    assert decided(more=[PASS]).exit_code == 3
    assert decided(more=[PASS], on_inconclusive="fail").exit_code == 1
    assert decided(more=[PASS], on_inconclusive="warn").exit_code == 3
    assert decided(more=[PASS, OPEN], on_inconclusive="warn").exit_code == 3
    assert decided(more=[PASS], on_inconclusive="extend").exit_code == 3


def test_a_verdict_is_json_and_comes_back(tmp_path: Path) -> None:
    verdict = decision(PASS, FAIL, pick("kl_p999", "PASS"))
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict
    write_verdict(verdict, tmp_path / "verdict.json")
    assert read_verdict(tmp_path / "verdict.json") == verdict
    assert verdict.records == {"baseline": record().sha256}
    assert list(verdict.baselines) == ["baseline"]
    assert verdict.baseline.name == "baseline"


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ('"FAIL"', '"PASS"', "was edited"),
        ('"alpha": 0.05', '"alpha": 0.06', "was edited"),
        ('"verdict"', '"v"', "whole"),
    ],
)
def test_an_edited_verdict_is_refused(old: str, new: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "verdict.json"
    write_verdict(decision(PASS, FAIL), path)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(IntegrityError, match=what):
        read_verdict(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(IntegrityError, match="not a whole verdict"):
        read_verdict(path)
    with pytest.raises(UserError, match="cannot read"):
        read_verdict(tmp_path / "nothing.json")


def test_items_that_turned_wrong_are_listed() -> None:
    items = task(5, 2, 7, 1)
    verdict = decide({"base": comparison(tasks=[items])}, policy(accuracy(100.0)))
    assert [(flip.task, flip.item_id) for flip in verdict.worst] == [("task", str(i)) for i in range(7, 12)]


def test_missing_sums_are_an_error_not_a_pass() -> None:
    base = record(model=model("baseline", 1000), baseline=None, texts=[text(log_ratio=0.0, alone=True)])
    alone = compare(record(baseline=None, texts=[text(alone=True)]), base)
    for gate, _, _ in GATES:
        if gate.kind in ("size_ratio", "bytes_max", "bits_per_weight_max", "ppl_ratio"):
            assert judge(gate, measure(gate, alone)[0], 0.05).verdict  # type: ignore[index]
        else:
            with pytest.raises(IntegrityError, match="scored alone"):
                measure(gate, alone)
    for gate in (accuracy(1.0), Degenerate(id="g", kind="degenerate", max=0.1)):
        with pytest.raises(IntegrityError):
            measure(gate, comparison())


def test_a_release_is_held_against_the_one_before() -> None:
    """Both were scored against the same model, so the growth of KL is paired by cluster."""
    before = record(model=model("earlier", 400, "w4a16-g128"), texts=[text(kl=0.020)])
    now = record(texts=[text(kl=0.021, noise=0.00101)])
    both = compare(now, before, name="last")
    assert both.baseline == before.model

    def verdict(increase: float) -> str:
        gate = KlIncrease(id="g", kind="kl_increase", max_increase=increase, baseline="last")
        return judge(gate, measure(gate, both)[0], 0.05).verdict  # type: ignore[index]

    assert (verdict(0.1), verdict(0.02)) == ("PASS", "FAIL")
    alone = compare(record(baseline=None, texts=[text(alone=True, log_ratio=0.021)]), before)
    with pytest.raises(IntegrityError, match="one and the same model"):
        measure(KlIncrease(id="g", kind="kl_increase", max_increase=0.1), alone)
    with pytest.raises(IntegrityError, match="scored against baseline"):
        measure(KlMean(id="g", kind="kl_mean", max=0.1), both)


def test_gates_name_their_baseline() -> None:
    before = record(model=model("earlier", 500, "w4a16-g128"))
    sides = {
        "root": compare(record(), name="root"),
        "last": compare(record(texts=[text(log_ratio=0.021)]), before, name="last"),
    }
    first = SizeRatio(id="first", kind="size_ratio", min=2.5)
    last = SizeRatio(id="last", kind="size_ratio", min=1.25, baseline="last")
    verdict = decide(sides, policy(first, last))
    assert [(g.id, g.baseline, g.estimate) for g in verdict.gates] == [("first", "root", 2.5), ("last", "last", 1.25)]
    assert set(verdict.records) == {"root", "last", "last alone"}
    with pytest.raises(UserError, match="baseline 'other'; given: root, last"):
        decide(sides, policy(first, last.model_copy(update={"baseline": "other"})))


def test_the_scheme_of_the_candidate_chooses_the_limits() -> None:
    tight = {"tight": {"schemes": ["w4*"], FAIL.id: {"max": 0.001}, PASS.id: {"max": 0.001}}}
    assert decision(PASS).exit_code == 0
    verdict = decision(PASS, FAIL, profile=tight)
    assert (verdict.profile, {g.limit for g in verdict.gates}, verdict.exit_code) == ("tight", {0.001}, 1)
    other = decision(PASS, profile={"tight": {"schemes": ["w8*"], PASS.id: {"max": 0.001}}})
    assert (other.profile, other.exit_code) == (None, 0)

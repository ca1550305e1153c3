"""Three-valued decisions: each gate can pass, fail and be undecided, and nothing passes by default."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from compress.errors import IntegrityError
from compress.evaluation.measures import Comparison, Measure, measure
from compress.evaluation.policy import KlMean, KlP999, Policy, PplRatio, SizeRatio, Top1Agreement
from compress.evaluation.records import KL_THRESHOLDS, BlockSums, EvalRecord, KlPercentiles, ModelRecord
from compress.evaluation.verdict import Verdict, decide, judge

BLOCKS, TOKENS = 32, 2000


def model(name: str, size: int) -> ModelRecord:
    return ModelRecord(
        name=name,
        digest=name[0] * 64,
        quantized=False,
        weights_bytes=size,
        parameters=1000,
        bits_per_weight=8 * size / 1000,
        tokenizer_sha256="e" * 64,
    )


def comparison(*, kl: float = 0.02, log_ratio: float = 0.02, agree: float = 0.9, noise: float = 0.001) -> Comparison:
    """Sums whose means are the arguments, blocks differing by `noise`."""
    wave = np.where(np.arange(BLOCKS) % 2 == 0, 1.0, -1.0)
    above = [int(TOKENS * 0.0005) if threshold > 0.1 else TOKENS for threshold in KL_THRESHOLDS]
    blocks = BlockSums(
        tokens=[TOKENS] * BLOCKS,
        nll=(TOKENS * (3.5 + log_ratio + noise * wave)).tolist(),
        nll_baseline=[TOKENS * 3.5] * BLOCKS,
        kl=(TOKENS * (kl + noise * wave)).tolist(),
        top1_agree=(TOKENS * (agree + noise * wave)).round().astype(int).tolist(),
        confident=[10] * BLOCKS,
        confident_agree=[10] * BLOCKS,
        kl_above=[above] * BLOCKS,
    )
    assert blocks.nll_baseline is not None
    tail = KlPercentiles(p50=0.01, p90=0.1, p99=0.1, p999=0.12, max=11.0)
    return Comparison(model("candidate", 400), model("baseline", 1000), blocks, blocks.nll_baseline, tail)


GATES: list[tuple[Any, str, str]] = [
    (SizeRatio(id="g", kind="size_ratio", min=2.5), "PASS", "exactly at the limit"),
    (SizeRatio(id="g", kind="size_ratio", min=2.6), "FAIL", ""),
    (KlMean(id="g", kind="kl_mean", max=0.0205), "PASS", ""),
    (KlMean(id="g", kind="kl_mean", max=0.0201), "INCONCLUSIVE", ""),
    (KlMean(id="g", kind="kl_mean", max=0.0199), "INCONCLUSIVE", ""),
    (KlMean(id="g", kind="kl_mean", max=0.0195), "FAIL", ""),
    (PplRatio(id="g", kind="ppl_ratio", max_increase=0.0210), "PASS", "exp(0.02) - 1 = 0.0202"),
    (PplRatio(id="g", kind="ppl_ratio", max_increase=0.0202), "INCONCLUSIVE", ""),
    (PplRatio(id="g", kind="ppl_ratio", max_increase=0.0195), "FAIL", ""),
    (Top1Agreement(id="g", kind="top1_agreement", min=0.895), "PASS", ""),
    (Top1Agreement(id="g", kind="top1_agreement", min=0.9), "INCONCLUSIVE", ""),
    (Top1Agreement(id="g", kind="top1_agreement", min=0.905), "FAIL", ""),
    (KlP999(id="g", kind="kl_p999", max=0.15), "PASS", "0.05% of the tokens are above 0.15"),
    (KlP999(id="g", kind="kl_p999", max=0.12), "INCONCLUSIVE", "between the thresholds 0.1 and 0.15"),
    (KlP999(id="g", kind="kl_p999", max=0.09), "FAIL", "all tokens are above 0.1"),
]


@pytest.mark.parametrize(("gate", "expected", "why"), GATES)
def test_every_kind_has_three_answers(gate: Any, expected: str, why: str) -> None:
    result = judge(gate, measure(gate, comparison(), 0.05))
    assert result.verdict == expected, (why, result)


def test_more_noise_makes_a_pass_undecided() -> None:
    gate = KlMean(id="g", kind="kl_mean", max=0.0205)
    assert judge(gate, measure(gate, comparison(noise=0.001), 0.05)).verdict == "PASS"
    assert judge(gate, measure(gate, comparison(noise=0.01), 0.05)).verdict == "INCONCLUSIVE"


@pytest.mark.parametrize("below", [True, False])
@pytest.mark.parametrize(
    "values", [(math.nan, 0.0, 0.0), (0.0, math.nan, 0.0), (0.0, 0.0, math.nan), (math.nan, math.nan, math.nan)]
)
def test_what_is_not_a_number_never_passes(values: Sequence[float], below: bool) -> None:
    gate = KlMean(id="g", kind="kl_mean", max=1.0)
    estimate, low, high = values
    result = judge(gate, Measure(estimate, low, high, 1.0 if below else -1.0, below=below))
    assert result.verdict == "FAIL"


def test_an_unknown_upper_bound_never_passes() -> None:
    gate = KlP999(id="g", kind="kl_p999", max=5.0)
    result = judge(gate, Measure(1.0, 0.5, None, 5.0, below=True))
    assert result.verdict == "INCONCLUSIVE"
    assert result.high is None


def test_bounds_are_not_rounded() -> None:
    gate = KlMean(id="g", kind="kl_mean", max=0.04)
    barely = math.nextafter(0.04, 1)
    assert judge(gate, Measure(0.04, 0.03, 0.04, 0.04, below=True)).verdict == "PASS"
    assert judge(gate, Measure(0.04, 0.03, barely, 0.04, below=True)).verdict == "INCONCLUSIVE"


def policy(*gates: Any, on_inconclusive: str = "inconclusive") -> Policy:
    return Policy.model_validate(
        {"version": 1, "gate": [g.model_dump() for g in gates], "on_inconclusive": on_inconclusive}
    )


def pick(kind: str, verdict: str, role: str = "primary") -> Any:
    gate = next(g for g, v, _ in GATES if g.kind == kind and v == verdict)
    return gate.model_copy(update={"role": role, "id": f"{kind}-{verdict}-{role}"})


def decision(record: EvalRecord, *gates: Any, on_inconclusive: str = "inconclusive") -> Verdict:
    rules = policy(*gates, on_inconclusive=on_inconclusive)
    return decide(comparison(), rules, record.data, record.environment)


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
        ([PASS, pick("top1_agreement", "FAIL", "secondary")], "fail", "PASS", 0),
        ([PASS, pick("top1_agreement", "INCONCLUSIVE", "secondary")], "fail", "PASS", 0),
    ],
)
def test_the_overall_verdict(
    gates: list[Any], on_inconclusive: str, expected: str, code: int, record: EvalRecord
) -> None:
    verdict = decision(record, *gates, on_inconclusive=on_inconclusive)
    assert (verdict.verdict, verdict.exit_code) == (expected, code)
    assert [g.id for g in verdict.gates] == [g.id for g in gates]
    undecided = [g for g in verdict.gates if g.verdict != "PASS"]
    blocking = expected != "PASS" and not any(g.role == "secondary" for g in undecided)
    assert bool(verdict.warnings) == (bool(undecided) and not blocking)


def test_a_verdict_is_json_and_comes_back(record: EvalRecord) -> None:
    verdict = decision(record, PASS, FAIL, pick("kl_p999", "PASS"))
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict


def test_missing_sums_are_an_error_not_a_pass() -> None:
    whole = comparison()
    alone = BlockSums(tokens=whole.blocks.tokens, nll=whole.blocks.nll)
    without = Comparison(whole.candidate, whole.baseline, alone, whole.nll_baseline)
    for gate, _, _ in GATES:
        if gate.kind in ("size_ratio", "ppl_ratio"):
            assert measure(gate, without, 0.05) == measure(gate, whole, 0.05)
        else:
            with pytest.raises(IntegrityError, match="scored alone"):
                measure(gate, without, 0.05)

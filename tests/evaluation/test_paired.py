"""Two candidates on the same blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from compress.errors import IntegrityError
from compress.evaluation.evaluate import evaluate
from compress.evaluation.paired import kl_difference, kl_ratio
from compress.evaluation.records import EvalRecord


@pytest.fixture(scope="module")
def better(tiny: Path, text: Path, rounded: Callable[..., Path]) -> EvalRecord:
    return evaluate(rounded(tiny, 5), tiny, data=text, device="cpu")


def test_the_better_of_two_is_told_with_an_interval(better: EvalRecord, record: EvalRecord) -> None:
    assert better.summary.kl_mean is not None
    assert record.summary.kl_mean is not None
    ours, theirs = better.summary.kl_mean, record.summary.kl_mean
    found = kl_ratio(better, record)
    assert found.estimate == pytest.approx(ours.estimate / theirs.estimate)
    assert found.low < found.estimate < found.high < 1
    assert found.high - found.low < (ours.high - ours.low) / theirs.low + (theirs.high - theirs.low)
    difference = kl_difference(better, record)
    assert difference.estimate == pytest.approx(ours.estimate - theirs.estimate)
    assert difference.high < 0
    assert kl_ratio(record, record).estimate == kl_ratio(record, record).high == 1.0


@pytest.mark.parametrize(
    ("section", "field", "value", "what"),
    [
        ("baseline", "digest", "a" * 64, "baseline"),
        ("data", "windows_sha256", "a" * 64, "tokens"),
        ("environment", "dtype", "bfloat16", "dtype"),
    ],
)
def test_other_tokens_or_baselines_are_refused(
    section: str, field: str, value: str, what: str, better: EvalRecord, record: EvalRecord
) -> None:
    changed = record.model_copy(update={section: getattr(record, section).model_copy(update={field: value})})
    with pytest.raises(IntegrityError, match=f"another {what}"):
        kl_ratio(better, changed)


def test_records_scored_alone_are_refused(better: EvalRecord, tiny: Path, text: Path) -> None:
    with pytest.raises(IntegrityError, match="scored alone"):
        kl_difference(better, evaluate(tiny, data=text, device="cpu"))

"""Two candidates on the same clusters of tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from compress.errors import IntegrityError
from compress.evaluation.evaluate import evaluate
from compress.evaluation.kl_pairs import kl_difference, kl_ratio
from compress.evaluation.records import EvalRecord


@pytest.fixture(scope="module")
def better(tiny: Path, text: Path, rounded: Callable[..., Path]) -> EvalRecord:
    return evaluate(rounded(tiny, 5), tiny, data=text, device="cpu")


def test_the_better_of_two_is_told_with_an_interval(better: EvalRecord, record: EvalRecord) -> None:
    ours, theirs = better.text().summary.kl_mean, record.text().summary.kl_mean
    assert ours is not None
    assert theirs is not None
    found = kl_ratio(better, record)
    assert found.estimate == pytest.approx(ours.estimate / theirs.estimate)
    assert found.low < found.estimate < found.high < 1
    assert found.high - found.low < (ours.high - ours.low) / theirs.low + (theirs.high - theirs.low)
    difference = kl_difference(better, record)
    assert difference.estimate == pytest.approx(ours.estimate - theirs.estimate)
    assert difference.high < 0
    assert kl_ratio(record, record).estimate == kl_ratio(record, record).high == 1.0


def test_the_text_can_be_named(better: EvalRecord, record: EvalRecord) -> None:
    name = record.text().data.name
    assert kl_ratio(better, record, name) == kl_ratio(better, record)
    with pytest.raises(IntegrityError, match="the text 'other'"):
        kl_ratio(better, record, "other")


@pytest.mark.parametrize(
    ("section", "field", "value", "what"),
    [
        ("baseline", "digest", "a" * 64, "baseline"),
        ("data", "windows_sha256", "a" * 64, "tokens"),
        ("clusters", "tokens", [1], "clusters"),
        ("environment", "dtype", "bfloat16", "dtype"),
    ],
)
def test_other_tokens_or_baselines_are_refused(
    section: str, field: str, value: object, what: str, better: EvalRecord, record: EvalRecord
) -> None:
    holder = record if section in ("baseline", "environment") else record.text()
    part = getattr(holder, section).model_copy(update={field: value})
    changed = holder.model_copy(update={section: part})
    if holder is not record:
        changed = record.model_copy(update={"texts": [changed]})
    with pytest.raises(IntegrityError, match=f"another {what}"):
        kl_ratio(better, changed)


def test_records_scored_alone_are_refused(better: EvalRecord, tiny: Path, text: Path) -> None:
    with pytest.raises(IntegrityError, match="scored alone"):
        kl_difference(better, evaluate(tiny, data=text, device="cpu"))

"""Comparisons: paired where the records allow it, refused with the reason where they do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from compress.errors import UserError
from compress.evaluation.record_parts import TextRecord
from compress.evaluation.records import EvalRecord, summarise
from compress.evaluation.reports.compare import Paired, compare
from compress.evaluation.reports.compare_document import comparable, front_svg, paired_table, reading, scores_table
from tests.evaluation.gate_records import CLUSTERS, TOKENS, environment, model, record, task, text


def noisy(kl: float, seed: int, spread: float = 0.3) -> TextRecord:
    """A text whose clusters differ a lot, in the same way for every model: some documents are hard for all."""
    hard = np.exp(np.random.default_rng(0).normal(0.0, 0.8, CLUSTERS))
    own = np.exp(np.random.default_rng(seed).normal(0.0, spread * 0.1, CLUSTERS))
    base = text(kl=kl)
    clusters = base.clusters.model_copy(update={"kl": (TOKENS * kl * hard * own).tolist()})
    return base.model_copy(
        update={
            "clusters": clusters,
            "summary": summarise(clusters, base.summary.kl_percentiles, base.summary.dp_percentiles),
        }
    )


def of(name: str, kl: float, size: int = 400, seed: int = 1, **changed: Any) -> EvalRecord:
    return record(**{"model": model(name, size, "w4a16-g128"), "texts": [noisy(kl, seed)], **changed})


def pairs(*records: EvalRecord) -> dict[str, Paired]:
    return {pair.what: pair for pair in compare(records).paired}


def test_the_ratio_of_kl_is_paired() -> None:
    a, b = of("awq", 0.016, seed=1), of("descent", 0.008, seed=2)
    found = pairs(a, b)["KL ratio"]
    ours, theirs = b.text().clusters.kl, a.text().clusters.kl
    assert ours is not None
    assert theirs is not None
    assert found.estimate == pytest.approx(sum(ours) / sum(theirs), rel=1e-12)
    # An independent interval: leave one cluster out in turn (jackknife).
    x, y = np.array(theirs), np.array(ours)
    left_out = (y.sum() - y) / (x.sum() - x)
    error = np.sqrt((CLUSTERS - 1) / CLUSTERS * ((left_out - left_out.mean()) ** 2).sum())
    half = stats.t.ppf(0.975, CLUSTERS - 1) * error
    assert 0.9 * half < found.high - found.estimate < 1.5 * half
    assert 0.9 * half < found.estimate - found.low < 1.5 * half
    apart = [each.texts[0].summary.kl_mean for each in (a, b)]
    assert all(each is not None and (each.high - each.low) / each.estimate > 5 * half for each in apart)
    assert reading(found) == "better"


def test_the_ratio_of_perplexity_needs_no_common_baseline() -> None:
    a = of("awq", 0.016)
    b = of("descent", 0.008, baseline=model("floats", 1000), texts=[text(log_ratio=0.01)])
    found = compare([a, b])
    assert [pair.what for pair in found.paired] == ["perplexity ratio"]
    assert found.paired[0].estimate == pytest.approx(np.exp(-0.01))
    assert [(u.what, u.why) for u in found.unpaired] == [("KL ratio", "other baselines: baseline and floats")]


def test_accuracy_is_paired_item_by_item() -> None:
    a = of("awq", 0.016, tasks=[task(700, 200, 60, 40)])
    b = of("descent", 0.008, tasks=[task(700, 200, 60, 40)])
    flipped = b.tasks[0].model_copy(update={"correct": [1] * 690 + [0] * 310})
    b = b.model_copy(update={"tasks": [flipped]})
    found = pairs(a, b)["accuracy on task"]
    before, after = np.array(a.tasks[0].correct), np.array(flipped.correct)
    lost, won = int(((before == 1) & (after == 0)).sum()), int(((before == 0) & (after == 1)).sum())
    assert found.estimate == pytest.approx(100 * (won - lost) / 1000)
    assert found.low < found.estimate < found.high
    exact = stats.binomtest(lost, lost + won, 0.5).pvalue
    assert found.p_value is not None
    assert found.p_value < exact < 2 * found.p_value + 1e-12
    assert reading(found) == "worse"


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("item_ids", [f"x{i}" for i in range(100)], "other items"),
        ("data_sha256", "0" * 64, "other data"),
        ("prompts_sha256", "0" * 64, "other prompts"),
        ("config_sha256", "0" * 64, "another task configuration"),
        ("metric", "acc_norm", "another metric"),
    ],
)
def test_tasks_that_differ_are_not_paired(field: str, value: Any, why: str) -> None:
    a = of("awq", 0.016, tasks=[task(50, 30, 10, 10)])
    b = of("descent", 0.008, tasks=[task(50, 30, 10, 10).model_copy(update={field: value})])
    assert ("accuracy on task", why) in [(u.what, u.why) for u in compare([a, b]).unpaired]
    assert "accuracy on task" not in pairs(a, b)


def test_what_only_one_of_them_has_is_said() -> None:
    a, b = of("awq", 0.016, tasks=[task(50, 30, 10, 10)]), of("descent", 0.008)
    assert [(u.what, u.why) for u in compare([a, b]).unpaired] == [
        ("accuracy on task", "only one of them was scored on it")
    ]


def test_other_tokens_are_not_paired() -> None:
    a, b = of("awq", 0.016), of("descent", 0.008)
    other = b.texts[0].model_copy(update={"data": b.texts[0].data.model_copy(update={"windows_sha256": "9" * 64})})
    found = compare([a, b.model_copy(update={"texts": [other]})])
    assert found.paired == ()
    assert "other tokens" in found.unpaired[0].why


@pytest.mark.parametrize("field", ["device", "dtype", "runtime"])
def test_other_arithmetic_is_not_paired(field: str) -> None:
    a, b = of("awq", 0.016), of("descent", 0.008, environment=environment(**{field: "other"}))
    found = compare([a, b])
    assert found.paired == ()
    assert [u.what for u in found.unpaired] == ["everything"]
    assert f"{field} " in found.unpaired[0].why


def test_a_model_against_itself_has_no_kl_to_compare_with() -> None:
    base = text()
    same = base.clusters.model_copy(update={"kl": [0.0] * CLUSTERS, "nll": base.clusters.nll_baseline})
    summary = summarise(same, base.summary.kl_percentiles, base.summary.dp_percentiles)
    itself = record(model=model("base", 1000), texts=[base.model_copy(update={"clusters": same, "summary": summary})])
    found = compare([itself, of("descent", 0.008)])
    assert [u.what for u in found.unpaired] == ["KL ratio"]
    assert "answers as its baseline does" in found.unpaired[0].why


def test_scored_alone_there_is_perplexity_only() -> None:
    a, b = record(baseline=None, texts=[text(alone=True)]), of("descent", 0.008, texts=[text()])
    found = compare([a, b])
    assert [pair.what for pair in found.paired] == ["perplexity ratio"]
    assert [model.best for model in found.models] == [None, True]
    assert "scored without a baseline" in found.unpaired[0].why


def test_the_front_is_among_models_of_one_baseline() -> None:
    records = [
        of("a", 0.016, 400),
        of("b", 0.02, 500),
        of("c", 0.008, 600),
        of("d", 0.001, 300, baseline=model("floats")),
    ]
    found = compare(records)
    assert [model.best for model in found.models] == [True, False, True, True]
    assert [model.name for model in comparable(found)] == ["a", "b", "c"]
    assert front_svg(found).startswith(b"<?xml")


def test_the_tables_leave_out_what_nobody_has() -> None:
    found = compare([of("a", 0.016), of("b", 0.008)])
    table = scores_table(found)
    assert "KL, nats" in [column.lstrip(">") for column in table.columns]
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert ">McNemar mid-p" not in paired_table(found).columns
    alone = record(baseline=None, texts=[text(alone=True)])
    assert not any("KL" in column for column in scores_table(compare([alone])).columns)


def test_equal_names_are_numbered() -> None:
    assert [m.name for m in compare([of("a", 0.1), of("b", 0.1), of("a", 0.1)]).models] == ["a #1", "b", "a #2"]


def test_a_text_that_nobody_was_scored_on_is_a_mistake() -> None:
    with pytest.raises(UserError, match="no record was scored on 'wikitext'"):
        compare([of("a", 0.1)], text="wikitext")
    with pytest.raises(UserError, match="nothing to compare"):
        compare([])


def test_a_model_of_unknown_size_is_in_the_table_only() -> None:
    """An endpoint shows its answers, not its weights."""
    hidden = {"weights_bytes": None, "parameters": None, "bits_per_weight": None, "tokenizer_sha256": None}
    far = of("distant", 0.001)
    far = far.model_copy(update={"model": far.model.model_copy(update=hidden)})
    found = compare([of("a", 0.016), far])
    assert [model.best for model in found.models] == [True, None]
    assert comparable(found) == [found.models[0]]
    assert scores_table(found).rows[1][1:3] == ("-", "-")

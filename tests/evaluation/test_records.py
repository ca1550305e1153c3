"""eval.json survives a round trip and nothing else: any cut, any edit, any contradiction is refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from compress.errors import IntegrityError, UserError, WorkError
from compress.evaluation.records import (
    EvalRecord,
    GenerationRecord,
    IntervalRecord,
    TaskRecord,
    parse_record,
    read_record,
    write_record,
)


def test_round_trip(record: EvalRecord, tmp_path: Path) -> None:
    write_record(record, tmp_path / "eval.json")
    assert read_record(tmp_path / "eval.json") == record
    assert (tmp_path / "eval.json").read_bytes() == record.to_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["eval.json"]


def test_what_a_record_holds(record: EvalRecord, tiny: Path, damaged: Path, text: Path) -> None:
    size = (damaged / "model.safetensors").stat().st_size
    assert record.model.weights_bytes == size
    stored = sum(tensor.nbytes for tensor in load_file(damaged / "model.safetensors").values())
    assert record.model.bits_per_weight == pytest.approx(8 * stored / record.model.parameters, abs=1e-6)
    assert record.baseline is not None
    assert record.baseline.digest != record.model.digest
    assert record.artifact_id is None
    data, sums = record.text().data, record.text().clusters
    assert (data.name, data.cluster_kind) == ("short", "blocks")
    assert data.tokens == sum(sums.tokens) == data.text_tokens
    assert sum(sums.text_bytes) == text.stat().st_size
    assert data.clusters == len(sums.tokens) >= 8
    assert (record.suite, record.tasks, record.generation, record.cost) == (None, [], None, None)
    assert record.environment.dtype == "float32"
    assert record.environment.threads == 1
    assert set(record.environment.versions) >= {"compress", "torch", "transformers", "python"}
    assert record.text("short").seconds > 0
    assert str(text.parent) not in record.to_bytes().decode()


def test_two_evaluations_give_the_same_numbers(record: EvalRecord, tiny: Path, damaged: Path, text: Path) -> None:
    from compress.evaluation.evaluate import evaluate

    again = evaluate(damaged, tiny, data=text, device="cpu")
    text_record = again.text().model_copy(update={"seconds": record.text().seconds})
    assert again.model_copy(update={"texts": [text_record]}).sealed() == record


def test_every_truncation_is_refused(record: EvalRecord) -> None:
    data = record.to_bytes()
    cuts = {0, 1, len(data) - 2, *random.Random(0).sample(range(len(data) - 1), 60)}
    for cut in cuts:
        with pytest.raises(IntegrityError):
            parse_record(data[:cut], "eval.json")


def numbers(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all numbers in a JSON value."""
    if isinstance(value, dict):
        return [found for key, item in value.items() for found in numbers(item, (*path, key))]
    if isinstance(value, list):
        return [found for index, item in enumerate(value) for found in numbers(item, (*path, index))]
    return [path] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def edited(record: EvalRecord, path: tuple[Any, ...]) -> bytes:
    value = json.loads(record.to_bytes())
    target = value
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] += 1
    return json.dumps(value).encode()


def test_every_edited_number_is_refused(record: EvalRecord) -> None:
    places = numbers(json.loads(record.to_bytes()))
    assert ("texts", 0, "summary", "kl_mean", "estimate") in places
    for path in [p for p in places if "clusters" not in p[:3]] + random.Random(0).sample(places, 30):
        with pytest.raises(IntegrityError):
            parse_record(edited(record, path), "eval.json")


@pytest.mark.parametrize(("key", "value"), [("model", None), ("schema_version", 4), ("extra", 1), ("kind", "other")])
def test_other_documents_are_refused(key: str, value: Any, record: EvalRecord) -> None:
    changed = {**json.loads(record.to_bytes()), key: value}
    with pytest.raises(IntegrityError, match=key):
        parse_record(json.dumps(changed).encode(), "eval.json")


def test_an_edit_with_a_new_hash_still_contradicts_the_sums(record: EvalRecord) -> None:
    text = record.text()
    assert text.summary.kl_mean is not None
    better = text.summary.kl_mean.model_copy(update={"estimate": text.summary.kl_mean.estimate / 2})
    for change in ({"kl_mean": better}, {"dp_rms": 0.0}, {"bits_per_byte": better}):
        forged = text.model_copy(update={"summary": text.summary.model_copy(update=change)})
        with pytest.raises(IntegrityError, match="contradicts itself"):
            parse_record(record.model_copy(update={"texts": [forged]}).sealed().to_bytes(), "eval.json")


@pytest.mark.parametrize("spelling", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_are_not_finite_are_refused(spelling: str, record: EvalRecord) -> None:
    first = json.dumps(record.text().clusters.nll[0])
    with pytest.raises(IntegrityError):
        parse_record(record.to_bytes().replace(first.encode(), spelling.encode(), 1), "eval.json")


def test_columns_have_to_fit(record: EvalRecord) -> None:
    for column in ("nll", "text_bytes", "kl", "dp2", "top1_agree", "kl_above"):
        value = json.loads(record.to_bytes())
        value["texts"][0]["clusters"][column].pop()
        with pytest.raises(IntegrityError, match="different length"):
            parse_record(json.dumps(value).encode(), "eval.json")
    value = json.loads(record.to_bytes())
    value["texts"][0]["clusters"]["kl"] = None
    with pytest.raises(IntegrityError, match="missing"):
        parse_record(json.dumps(value).encode(), "eval.json")
    value = json.loads(record.to_bytes())
    value["texts"][0]["clusters"]["kl_above"][0].pop()
    with pytest.raises(IntegrityError, match="kl_above"):
        parse_record(json.dumps(value).encode(), "eval.json")


INTERVAL = IntervalRecord(estimate=0.75, low=0.3, high=0.95, level=0.95)
TASK: dict[str, Any] = {
    "name": "cloze",
    "kind": "multiple_choice",
    "metric": "acc",
    "data_sha256": "a" * 64,
    "config_sha256": "b" * 64,
    "prompts_sha256": "c" * 64,
    "item_ids": ["1", "2", "3", "4"],
    "correct": [1, 0, 1, 1],
    "correct_baseline": [1, 1, 1, 0],
    "chance": 0.25,
    "clusters": ["x", "x", "y", "y"],
    "answers_sha256": "d" * 64,
    "answers_baseline_sha256": "e" * 64,
    "accuracy": INTERVAL,
    "accuracy_baseline": INTERVAL,
    "metrics": {"acc_norm": 0.5},
    "gates": False,
    "why_not": "too near chance",
}
ANSWERS: dict[str, Any] = {
    "prompts": 2,
    "max_tokens": 10,
    "prompts_sha256": "f" * 64,
    "identical": 0.5,
    "first_difference_mean": 7.0,
    "degenerate": 0.0,
    "empty": 0.0,
    "identical_per_prompt": [1, 0],
    "first_difference": [10, 4],
    "degenerate_per_prompt": [0, 0],
}


@pytest.fixture
def full(record: EvalRecord) -> EvalRecord:
    """A record with a task and answers besides its text."""
    added = {"tasks": [TaskRecord(**TASK)], "generation": GenerationRecord(**ANSWERS)}
    return record.model_copy(update=added).sealed()


def test_tasks_and_answers_survive_the_round_trip(full: EvalRecord) -> None:
    assert parse_record(full.to_bytes(), "eval.json") == full
    assert full.task("cloze").correct == [1, 0, 1, 1]
    places = [p for p in numbers(json.loads(full.to_bytes())) if p[0] in ("tasks", "generation")]
    assert len(places) > 20
    for path in places:
        with pytest.raises(IntegrityError):
            parse_record(edited(full, path), "eval.json")


def test_what_was_not_scored_is_named(full: EvalRecord) -> None:
    with pytest.raises(IntegrityError, match=r"'wikitext-2' \(scored: short\)"):
        full.text("wikitext-2")
    with pytest.raises(IntegrityError, match=r"'blimp' \(scored: cloze\)"):
        full.task("blimp")
    with pytest.raises(IntegrityError, match="any text"):
        full.model_copy(update={"texts": []}).text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v["tasks"][0]["correct"].pop(), "different length"),
        (lambda v: v["tasks"][0].update(item_ids=["1", "1", "2", "3"]), "twice"),
        (lambda v: v["tasks"][0].update(correct=[0, 0, 2, 1]), "less than or equal to 1"),
        (lambda v: v["tasks"][0].update(correct_baseline=None), "baseline's fields"),
        (lambda v: v["tasks"][0].update(gates=True), "why_not"),
        (
            lambda v: v["tasks"][0].update({k: [] for k in ("item_ids", "correct", "correct_baseline", "clusters")}),
            "out items",
        ),
        (lambda v: v["tasks"].append(v["tasks"][0]), "two tasks of one name"),
        (lambda v: v["texts"].append(v["texts"][0]), "two texts"),
        (lambda v: v["generation"]["first_difference"].pop(), "different length"),
        (lambda v: v["generation"].update(identical=None), "baseline's fields"),
        (lambda v: v.update(baseline=None), "the baseline's columns belong"),
        (lambda v: v.update(texts=[], tasks=[], generation=None), "without a single score"),
        (lambda v: v["texts"][0]["data"].update(clusters=3), "different clusters"),
    ],
)
def test_records_that_cannot_be_are_refused(change: Callable[[Any], object], words: str, full: EvalRecord) -> None:
    value = json.loads(full.to_bytes())
    change(value)
    with pytest.raises(IntegrityError, match=words):
        parse_record(json.dumps(value).encode(), "eval.json")


@pytest.mark.parametrize(
    "change",
    [
        {"tasks": [TaskRecord(**{**TASK, "correct": [1, 1, 1, 1]})]},
        {"tasks": [TaskRecord(**{**TASK, "correct_baseline": [1, 1, 1, 1]})]},
        {"generation": GenerationRecord(**{**ANSWERS, "degenerate_per_prompt": [1, 0]})},
        {"generation": GenerationRecord(**{**ANSWERS, "first_difference": [10, 5]})},
        {"generation": GenerationRecord(**{**ANSWERS, "identical_per_prompt": [0, 0]})},
    ],
)
def test_answers_that_contradict_their_summary_are_refused(change: dict[str, Any], full: EvalRecord) -> None:
    with pytest.raises(IntegrityError, match="contradicts itself"):
        parse_record(full.model_copy(update=change).sealed().to_bytes(), "eval.json")


@pytest.mark.parametrize("schema", [1, 2])
def test_a_record_of_an_older_schema_asks_to_score_again(schema: int, record: EvalRecord) -> None:
    old = {"schema_version": schema, "kind": "compress.eval", "summary": {}, "blocks": {}}
    with pytest.raises(IntegrityError, match=f"eval record of schema {schema}, not 3") as caught:
        parse_record(json.dumps(old).encode(), "eval.json")
    assert "score the model again" in caught.value.hint


def test_missing_file_and_unwritable_place(record: EvalRecord, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        read_record(tmp_path / "nothing.json")
    with pytest.raises(WorkError):
        write_record(record, tmp_path / "no" / "such" / "eval.json")


def test_records_policies_and_verdicts_do_not_import_torch() -> None:
    code = (
        "import sys, compress.evaluation.gate, compress.evaluation.records, compress.evaluation.policy;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

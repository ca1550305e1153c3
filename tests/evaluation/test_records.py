"""eval.json survives a round trip and nothing else: any cut, any edit, any contradiction is refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compress.errors import IntegrityError, UserError, WorkError
from compress.evaluation.records import EvalRecord, parse_record, read_record, write_record


def test_round_trip(record: EvalRecord, tmp_path: Path) -> None:
    write_record(record, tmp_path / "eval.json")
    assert read_record(tmp_path / "eval.json") == record
    assert (tmp_path / "eval.json").read_bytes() == record.to_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["eval.json"]


def test_what_a_record_holds(record: EvalRecord, tiny: Path, damaged: Path, text: Path) -> None:
    size = (damaged / "model.safetensors").stat().st_size
    assert record.model.weights_bytes == size
    assert record.model.bits_per_weight == pytest.approx(8 * size / record.model.parameters, abs=1e-6)
    assert record.baseline is not None
    assert record.baseline.digest != record.model.digest
    assert record.artifact_id is None
    assert record.data.name == "short"
    assert record.data.tokens == sum(record.blocks.tokens) == record.data.windows * (record.data.seq_len - 1)
    assert record.data.blocks == len(record.blocks.tokens) >= 8
    assert record.environment.dtype == "float32"
    assert record.environment.threads == 1
    assert set(record.environment.versions) >= {"compress", "torch", "transformers", "python"}
    assert record.speed.score_tokens_per_second > 0
    assert str(text.parent) not in record.to_bytes().decode()


def test_two_evaluations_give_the_same_numbers(record: EvalRecord, tiny: Path, damaged: Path, text: Path) -> None:
    from compress.evaluation.evaluate import evaluate

    again = evaluate(damaged, tiny, data=text, device="cpu")
    assert again.model_copy(update={"speed": record.speed}).sealed() == record


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
    assert ("summary", "kl_mean", "estimate") in places
    for path in [p for p in places if p[0] != "blocks"] + random.Random(0).sample(places, 30):
        with pytest.raises(IntegrityError):
            parse_record(edited(record, path), "eval.json")


@pytest.mark.parametrize(("key", "value"), [("model", None), ("schema_version", 2), ("extra", 1), ("kind", "other")])
def test_other_documents_are_refused(key: str, value: Any, record: EvalRecord) -> None:
    changed = {**json.loads(record.to_bytes()), key: value}
    with pytest.raises(IntegrityError, match=key):
        parse_record(json.dumps(changed).encode(), "eval.json")


def test_an_edit_with_a_new_hash_still_contradicts_the_sums(record: EvalRecord) -> None:
    assert record.summary.kl_mean is not None
    better = record.summary.kl_mean.model_copy(update={"estimate": record.summary.kl_mean.estimate / 2})
    forged = record.model_copy(update={"summary": record.summary.model_copy(update={"kl_mean": better})}).sealed()
    with pytest.raises(IntegrityError, match="contradicts itself"):
        parse_record(forged.to_bytes(), "eval.json")


@pytest.mark.parametrize("spelling", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_are_not_finite_are_refused(spelling: str, record: EvalRecord) -> None:
    first = json.dumps(record.blocks.nll[0])
    with pytest.raises(IntegrityError):
        parse_record(record.to_bytes().replace(first.encode(), spelling.encode(), 1), "eval.json")


def test_columns_have_to_fit(record: EvalRecord) -> None:
    for column in ("nll", "kl", "top1_agree", "kl_above"):
        value = json.loads(record.to_bytes())
        value["blocks"][column].pop()
        with pytest.raises(IntegrityError, match="different length"):
            parse_record(json.dumps(value).encode(), "eval.json")
    value = json.loads(record.to_bytes())
    value["blocks"]["kl"] = None
    with pytest.raises(IntegrityError, match="missing"):
        parse_record(json.dumps(value).encode(), "eval.json")
    value = json.loads(record.to_bytes())
    value["blocks"]["kl_above"][0].pop()
    with pytest.raises(IntegrityError, match="kl_above"):
        parse_record(json.dumps(value).encode(), "eval.json")


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

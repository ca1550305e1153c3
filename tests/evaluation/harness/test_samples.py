"""samples.jsonl.gz: what was written comes back, equal scores give equal bytes, damage is refused."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from compress.artifact import durable
from compress.errors import IntegrityError, UserError, WorkError
from compress.evaluation.harness import ItemScore
from compress.evaluation.samples import NAME, read_samples, to_bytes, write_samples
from tests.evaluation.harness.helpers import scores, with_item


def tasks() -> list:  # type: ignore[type-arg]

    answered = with_item(
        scores([1, 0]), 0, choice_lls=None, nll=None, n_tok=None, n_bytes=None, answer="“oui”\n", pred="oui"
    )
    return [scores([1, 0, 1]), replace(answered, name="mine")]


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    sha256 = write_samples(tasks(), tmp_path / NAME)
    first, second = tasks()
    assert read_samples(tmp_path / NAME) == {"blimp": list(first.items), "mine": list(second.items)}
    assert len(sha256) == 64
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_one_line_per_item_with_the_fields_of_the_contract(tmp_path: Path) -> None:
    write_samples(tasks(), tmp_path / NAME)
    lines = gzip.decompress((tmp_path / NAME).read_bytes()).decode().splitlines()
    assert len(lines) == 5
    assert set(json.loads(lines[0])) == {
        *("task", "item_id", "doc_hash", "prompt_hash", "correct", "pred"),
        *("choice_lls", "nll", "n_tok", "n_bytes", "answer"),
    }


def test_equal_scores_give_equal_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    first = to_bytes(tasks())
    monkeypatch.setattr("time.time", lambda: 1e9)
    assert to_bytes(tasks()) == first
    assert to_bytes(tasks()[::-1]) != first


def test_a_crash_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_samples(tasks()[:1], tmp_path / NAME)

    def crash(label: str) -> None:
        if label.startswith("before rename"):
            raise KeyboardInterrupt

    monkeypatch.setattr(durable, "step", crash)
    with pytest.raises(KeyboardInterrupt):
        write_samples(tasks(), tmp_path / NAME)
    assert list(read_samples(tmp_path / NAME)) == ["blimp"]


def test_damage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / NAME
    data = to_bytes(tasks())
    for damaged in (data[:-10], data[:5], b"", data[:40] + bytes([data[40] ^ 1]) + data[41:]):
        path.write_bytes(damaged)
        with pytest.raises(IntegrityError, match="truncated"):
            read_samples(path)
    path.write_bytes(gzip.compress(b'{"task": "blimp"}\n'))
    with pytest.raises(IntegrityError, match="line 1"):
        read_samples(path)
    with pytest.raises(UserError, match="cannot read"):
        read_samples(tmp_path / "none.gz")
    with pytest.raises(WorkError):
        write_samples(tasks(), tmp_path / "no" / "directory")


def test_numbers_that_are_none_are_never_written() -> None:
    with pytest.raises(ValueError, match="JSON"):
        to_bytes([with_item(scores([1]), 0, nll=float("nan"))])
    assert ItemScore("0", "d", "p", 1, 0).choice_lls is None

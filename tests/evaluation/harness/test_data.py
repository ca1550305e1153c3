"""Where data is looked for, and that changed data is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from compress import content
from compress.errors import IntegrityError, UserError
from compress.evaluation.harness import data
from compress.evaluation.harness.data import find_data, find_text, shipped_file
from compress.evaluation.harness.run import resolve
from compress.evaluation.suites import SuiteTask

COPA = "copa/copa.jsonl"


@pytest.fixture
def private(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data directory of its own, with COPA, named by COMPRESS_DATA."""
    (tmp_path / "copa").mkdir()
    shutil.copy(shared / "data" / COPA, tmp_path / COPA)
    monkeypatch.setenv(data.VARIABLE, str(tmp_path))
    return tmp_path


def test_the_environment_comes_first(private: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_data(COPA) == private / COPA
    monkeypatch.delenv(data.VARIABLE)
    assert find_data(COPA) == shared / "data" / COPA


def test_a_changed_file_is_refused(private: Path) -> None:
    task = SuiteTask(name="copa")
    assert len(resolve(task).rows or {}) == 100
    (private / COPA).write_text((private / COPA).read_text().replace('"gold": 1', '"gold": 0', 1))
    with pytest.raises(IntegrityError, match="SHA-256") as caught:
        resolve(task)
    assert str(private / COPA) in caught.value.message


def test_a_file_that_no_hash_is_known_of_is_refused(private: Path) -> None:
    (private / "copa" / "mine.jsonl").write_text("{}\n")
    with pytest.raises(IntegrityError, match="no SHA-256"):
        find_data("copa/mine.jsonl")


def test_missing_data_is_told_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_directories", lambda: [tmp_path])
    with pytest.raises(UserError, match="is not there") as caught:
        resolve(SuiteTask(name="piqa"))
    assert data.VARIABLE in caught.value.hint
    assert str(tmp_path) in caught.value.message


def test_a_variable_that_names_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(data.VARIABLE, "/no/such/directory")
    with pytest.raises(UserError, match="no directory"):
        find_data(COPA)


def test_without_data_what_ships_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_directories", list)
    monkeypatch.delenv(data.VARIABLE, raising=False)
    with pytest.raises(UserError, match="is not there") as caught:
        resolve(SuiteTask(name="wsc"))
    assert "wsc:273" in caught.value.hint
    assert len(resolve(SuiteTask(name="wsc", items=273)).rows or {}) == 273
    for name in ("copa", "gsm8k"):
        with pytest.raises(UserError, match="is not there") as caught:
            resolve(SuiteTask(name=name))
        assert "ship:" not in caught.value.hint


def test_the_hub_is_asked_where_the_variable_names_a_data_set(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def download(*arguments: str, repo_type: str) -> str:
        asked.append((*arguments, repo_type))
        return str(tmp_path / "fetched")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(data, "_directories", list)
    monkeypatch.setenv(data.VARIABLE, "someone/evaluation-data")
    shutil.copy(shared / "data" / COPA, tmp_path / "fetched")
    assert find_data(COPA) == tmp_path / "fetched"
    assert asked == [("someone/evaluation-data", COPA, "dataset")]
    (tmp_path / "fetched").write_text("{}\n")
    with pytest.raises(IntegrityError):
        find_data(COPA)


def test_no_network_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_directories", list)
    monkeypatch.setenv(data.VARIABLE, "someone/evaluation-data")
    with pytest.raises(UserError, match="could not be fetched"):
        find_data(COPA)


def test_texts_have_names(shared: Path) -> None:
    assert find_text("wikitext-2") == shared / "data" / "wikitext-2-raw" / "wiki.test.raw"
    assert find_text("tales_heldout") is None


def test_shipped_items_are_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "eval"
    shutil.copytree(content.eval_dir(), copy)
    monkeypatch.setattr(content, "eval_dir", lambda: copy)
    task = SuiteTask(name="blimp", items=67)
    assert len(resolve(task).rows or {}) == 67
    file = copy / "data" / "tasks" / "blimp.jsonl"
    text = file.read_text()
    file.write_text(text.replace('"good":', '"worse":', 1))
    with pytest.raises(IntegrityError, match="SHA-256"):
        resolve(task)
    file.unlink()
    with pytest.raises(IntegrityError, match="missing"):
        shipped_file("tasks/blimp.jsonl")

"""A run killed at any durable step resumes, recomputes nothing it had committed, and ends in the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.artifact import durable
from compress.artifact.canonical import sha256_file, sha256_json
from tests.artifact import crash_driver, producer

Produce = Callable[..., producer.Outcome]
NEW = sha256_json(producer.recipe())
OLD = "0" * 64


SCENARIOS = ("fresh", "twice", "replace", "replace-without-exchange", "replace-directory", "attach")

Crash = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def crash(tmp_path_factory: pytest.TempPathFactory) -> Crash:
    """crash(scenario): its records. All run in one process, in memory where possible: it fsyncs thousands of times."""
    memory = Path("/dev/shm")
    base = memory if os.access(memory, os.W_OK) else tmp_path_factory.mktemp("crash")
    with tempfile.TemporaryDirectory(dir=base) as folder:
        root = Path(__file__).parents[2]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        command = [sys.executable, "-m", "tests.artifact.crash_driver", folder, *SCENARIOS]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    return lambda scenario: [record for record in records if record["scenario"] == scenario]


def check(records: list[dict[str, Any]], expected: list[tuple[str, str]]) -> None:
    """What holds after every crash, whatever was at the output."""
    for record in records:
        assert record["status"] == crash_driver.CRASHED
        assert not record["locked"], record
        assert record["problems"] == [], record
        assert record["weights"] == [list(pair) for pair in expected], record
        assert record["recipe"] == NEW, record


def undisturbed(produce: Produce, path: Path) -> list[tuple[str, str]]:
    """The weight files of a run that nothing disturbs."""
    return [(file.name, sha256_file(file)) for file in produce(path).artifact.weight_files]


def test_a_fresh_run_crashed_at_every_step(crash: Crash, tmp_path: Path, produce: Produce) -> None:
    records = crash("fresh")
    check(records, undisturbed(produce, tmp_path / "reference"))
    for record in records:
        assert record["seen"] in ("absent", NEW), record
        assert record["left"] == [], record
        if record["seen"] == "absent":
            assert record["computed"] == producer.BLOCKS - record["committed"], record
        else:
            assert record["already"], record
    labels = [record["label"] for record in records]
    for part in (
        "write block-00002",
        "during write model-00001",
        "append to journal",
        "fsync",
        "rename to out",
        "remove",
    ):
        assert any(part in label for label in labels), part
    assert {record["committed"] for record in records if record["seen"] == "absent"} == set(range(producer.BLOCKS + 1))
    appearing = [record["seen"] for record in records]
    assert appearing == sorted(appearing, key=lambda seen: seen == NEW), "once complete, always complete"
    assert labels[appearing.index(NEW)] == "after rename to out"


def test_the_run_that_resumes_may_be_killed_too(crash: Crash, tmp_path: Path, produce: Produce) -> None:
    records = crash("twice")
    check(records, undisturbed(produce, tmp_path / "reference"))
    for record in records:
        assert record["left"] == [], record
        if record["seen"] == "absent":
            assert record["computed"] == producer.BLOCKS - record["committed"], record


def test_an_old_artifact_is_replaced_in_one_step(crash: Crash, tmp_path: Path, produce: Produce) -> None:
    records = crash("replace")
    check(records, undisturbed(produce, tmp_path / "reference"))
    assert {record["seen"] for record in records} == {OLD, NEW}, "there is always one whole artifact at the output"
    assert all(record["left"] == [] for record in records)
    assert any("exchange" in record["label"] for record in records)
    assert all(record["computed"] == 0 for record in records if record["seen"] == OLD)


def test_an_old_artifact_is_replaced_without_exchange(crash: Crash, tmp_path: Path, produce: Produce) -> None:
    records = crash("replace-without-exchange")
    check(records, undisturbed(produce, tmp_path / "reference"))
    assert {record["seen"] for record in records} <= {OLD, NEW, "absent"}
    assert all(record["left"] == [] for record in records)
    window = [record["label"] for record in records if record["seen"] == "absent"]
    assert window == ["after rename to .out.old", "before rename to out"]


def test_somebodys_directory_is_kept_beside(crash: Crash, tmp_path: Path, produce: Produce) -> None:
    records = crash("replace-directory")
    check(records, undisturbed(produce, tmp_path / "reference"))
    assert all(record["notes"] == ["do not lose me"] for record in records)
    assert all(record["left"] == ["out.replaced-1"] for record in records)


def test_attaching_crashed_at_every_step(crash: Crash) -> None:
    records = crash("attach")
    assert len(records) > 10
    for record in records:
        assert record["status"] == crash_driver.CRASHED
        assert record["same_id"], record
        assert record["after"] == [], record
        assert record["kl"] == 0.1
        for file in record["problems"]:
            assert file in ("eval.json", "README.md") or file.endswith(".tmp"), record
    assert any(record["problems"] for record in records)


def test_what_a_journal_line_names_is_on_the_disk_first(
    tmp_path: Path, produce: Produce, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    monkeypatch.setattr(durable, "step", steps.append)
    produce(tmp_path / "out")
    commits = [i for i, label in enumerate(steps) if label == "before append to journal.jsonl"]
    assert len(commits) == producer.BLOCKS + 1
    for block, commit in enumerate(commits[1:]):
        since = steps[commits[block] : commit]
        for folder in ("parts", "state"):
            written = since.index(f"after fsync block-{block:05d}.safetensors")
            assert f"after fsync {folder}" in since[written:]
        after = steps[commit:].index("before fsync journal.jsonl")
        assert steps[commit + after + 1] == "after append to journal.jsonl"
    appeared = steps.index("before rename to out")
    new_files = [label for label in steps[:appeared] if label.startswith("after write")]
    for label in new_files[-8:]:
        assert f"after fsync {label.removeprefix('after write ')}" in steps[:appeared]
    assert steps[appeared - 1] == "after fsync new"
    assert f"after fsync {tmp_path.name}" in steps[appeared:]

"""A quantisation run killed at any moment goes on where it stopped and ends in the bytes of an undisturbed run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import pipeline
from compress.artifact import durable
from compress.artifact.output import staging_path
from compress.errors import UserError, WorkError
from compress.progress import NullProgress
from tests.pipeline import crash_driver, harness
from tests.pipeline.crash_driver import BLOCKS, CRASHED
from tests.pipeline.harness import CALIBRATED, recipe

Records = list[dict[str, Any]]
RESULT = ("artifact_id", "tensors", "ledger", "fallbacks", "layers")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: the runs fsync thousands of times."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as name:
        yield Path(name)


@pytest.fixture
def crash(folder: Path) -> Callable[..., Records]:
    """crash(method, *words): the records of the crash driver; the first is of an undisturbed run."""

    def crash(*words: object) -> Records:
        root = Path(__file__).parents[2]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        command = [sys.executable, "-m", "tests.pipeline.crash_driver", str(folder), *map(str, words)]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=3000)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return crash


def check(records: Records) -> Records:
    """What holds after every crash. Returns the records of the crashes."""
    undisturbed, *crashes = records
    assert (undisturbed["resumed"], undisturbed["computed"]) == (0, BLOCKS)
    for record in crashes:
        where = (record["step"], record["label"])
        assert record["status"] == CRASHED, where
        assert record["seen"] in ("absent", undisturbed["artifact_id"]), where
        assert not record["locked"], where
        assert record["rerun"] == 0, where
        assert {key: record[key] for key in RESULT} == {key: undisturbed[key] for key in RESULT}, where
        assert record["problems"] == [], where
        assert record["left"] == [], where
        if record["seen"] == "absent":
            # Nothing that was journalled is computed again: a run that begins at zero fails here.
            assert record["resumed"] == record["journalled"], where
            assert record["resumed"] + record["computed"] == BLOCKS, where
        else:
            assert record["already"], where
    return crashes


@pytest.mark.parametrize(("method", "first"), [("gptq", 2), ("awq", 6)])
def test_crashes_at_some_steps(method: str, first: int, crash: Callable[..., Records]) -> None:
    crashes = check(crash(method, first, 12))
    assert len(crashes) > 12
    assert {record["journalled"] for record in crashes if record["seen"] == "absent"} == set(range(BLOCKS + 1))


@pytest.mark.slow
@pytest.mark.parametrize("method", CALIBRATED)
def test_crashes_at_every_step(method: str, crash: Callable[..., Records]) -> None:
    crashes = check(crash(method, 1, 1))
    assert [record["step"] for record in crashes] == list(range(1, len(crashes) + 1))
    labels = [record["label"] for record in crashes]
    for block in range(BLOCKS):
        for moment in ("before", "during", "after"):
            assert f"{moment} write block-{block:05d}.safetensors" in labels
    for step in ("fsync parts", "fsync state", "append to journal.jsonl", "fsync journal.jsonl", "write layers.json"):
        assert f"before {step}" in labels
    appeared = [record["seen"] != "absent" for record in crashes]
    assert labels[appeared.index(True)] == "after rename to out"
    assert appeared == sorted(appeared), "once there, always there"
    for count in range(BLOCKS + 1):
        assert any(record["journalled"] == count for record in crashes if record["seen"] == "absent")


@pytest.mark.slow
@pytest.mark.parametrize("method", CALIBRATED)
def test_ten_random_kills_of_a_longer_run(
    method: str, crash: Callable[..., Records], packaged_model: Path, text: Path
) -> None:
    undisturbed, *attempts = crash(method, "--kill", 10, packaged_model, text)
    blocks = undisturbed["computed"]
    kills = [kill for attempt in attempts for kill in attempt["killed"]]
    assert len(kills) == 10
    assert all(kill["status"] == -9 for kill in kills)
    assert all(kill["seen"] in ("absent", undisturbed["artifact_id"]) for kill in kills)
    assert all(kill["journalled"] >= kill["before"] for kill in kills if kill["staged"]), "nothing finished is lost"
    assert any(0 < kill["journalled"] < blocks for kill in kills), "some kill must fall between two blocks"
    for attempt in attempts:
        assert {key: attempt[key] for key in RESULT} == {key: undisturbed[key] for key in RESULT}
        assert attempt["problems"] == []
        assert attempt["left"] == []
        if not attempt["already"]:
            assert attempt["resumed"] == attempt["before"]
            assert attempt["resumed"] + attempt["computed"] == blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", CALIBRATED)
def test_an_error_between_blocks_is_resumed_too(
    method: str,
    dtype: torch.dtype,
    tiny: Callable[..., Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, wanted = tiny("llama", **crash_driver.TINY, dtype=dtype), recipe(method, text, group_size=16)
    whole = pipeline.run(wanted, model=source, output=tmp_path / "whole").artifact
    steps: list[str] = []
    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(durable, "step", harness.failing_at("before write block-00002.safetensors"))
        with pytest.raises(WorkError, match="the disk is full"):
            pipeline.run(wanted, model=source, output=output)
    assert not output.exists()
    assert staging_path(output).is_dir()
    monkeypatch.setattr(durable, "step", steps.append)
    torch.set_num_threads(2)  # the rest of the work may be shared out in another way
    result = pipeline.run(wanted, model=source, output=output)
    assert (result.resumed_blocks, result.computed_blocks) == (2, 2)
    written = [step for step in steps if step.startswith("before write block-")]
    assert written == [f"before write block-0000{block}.safetensors" for block in (2, 2, 3)], "a part, a state, a part"
    assert result.artifact.artifact_id == whole.artifact_id
    assert harness.tensor_hashes(result.artifact) == harness.tensor_hashes(whole)
    assert not staging_path(output).exists()
    assert pipeline.run(wanted, model=source, output=output).complete_already


@pytest.mark.parametrize("change", ["changed", "added", "removed"])
def test_a_changed_tokenizer_is_another_source(change: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    source = harness.copy_with(tiny("llama", **crash_driver.TINY), tmp_path / "model", lambda tensors: tensors)
    (source / "LICENSE").write_text("Do as you like.")
    wanted, output = recipe("rtn", group_size=16), tmp_path / "out"
    pipeline.run(wanted, model=source, output=output)
    assert pipeline.run(wanted, model=source, output=output).complete_already
    if change == "changed":
        settings = harness.read_json(source / "tokenizer_config.json")
        (source / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ messages }}"}))
    elif change == "added":
        (source / "generation_config.json").write_text('{"temperature": 0.5}')
    else:
        (source / "LICENSE").unlink()
    with pytest.raises(UserError, match="another recipe or source"):
        pipeline.run(wanted, model=source, output=output)


def test_a_changed_source_is_not_resumed(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source = harness.copy_with(tiny("llama", **crash_driver.TINY), tmp_path / "model", lambda tensors: tensors)
    first = pipeline.run(recipe("gptq", text, group_size=16), model=source, output=tmp_path / "out")

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        tensors["model.layers.3.mlp.up_proj.weight"][0, 0] += 1
        return tensors

    other = harness.copy_with(source, tmp_path / "other", change)
    second = pipeline.run(recipe("gptq", text, group_size=16), model=other, output=tmp_path / "out", restart=True)
    assert (second.resumed_blocks, second.computed_blocks) == (0, BLOCKS)
    assert second.artifact.artifact_id != first.artifact.artifact_id


def test_a_source_that_was_moved_is_the_same_source(
    tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, wanted = tiny("llama", **crash_driver.TINY), recipe("awq", text, group_size=16)
    moved, output = harness.copy_with(source, tmp_path / "moved", lambda tensors: tensors), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(
            durable, "step", harness.failing_at("before write block-00001.safetensors", KeyboardInterrupt())
        )
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(wanted, model=source, output=output)
    progress = Recorder()
    result = pipeline.run(wanted, model=moved, output=output, progress=progress)
    assert (result.resumed_blocks, result.computed_blocks) == (1, BLOCKS - 1)
    assert progress.total == len(progress.notes) == BLOCKS
    assert progress.ended
    assert "done before" in progress.notes[0]
    whole = pipeline.run(wanted, model=source, output=tmp_path / "whole").artifact
    assert result.artifact.artifact_id == whole.artifact_id


class Recorder(NullProgress):
    """What a run says of its progress."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.total = 0
        self.ended = False

    def begin(self, what: str, total: int) -> None:
        self.total = total

    def advance(self, note: str = "") -> None:
        self.notes.append(note)

    def end(self) -> None:
        self.ended = True

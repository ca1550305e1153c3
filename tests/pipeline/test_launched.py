"""Processes that a launcher started share a training: one makes the artifact, and says what is wrong in any of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from compress import pipeline
from compress.artifact.reader import Artifact
from compress.distillation.processes import joined, shared_by, wanted
from compress.errors import UserError
from compress.pipeline import helper, helpers
from compress.recipe_distill import DistillSettings, build_distill_recipe
from tests.pipeline import harness

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--num_machines=1"]
"""It starts them by torchrun."""
WITHOUT_ROOM = """
import sys
from compress.pipeline import helper

def no_room(job):
    raise MemoryError("no room")

helper.open_student = no_room
sys.exit(helper.main())
"""
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def student(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.a_little_off(tiny("llama"), tmp_path_factory.mktemp("launched") / "student")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def words(teacher: Path, student: Path, text: str) -> list[str]:
    models = ["--teacher", str(teacher), "--student", str(student), "--lora-rank", "4", "--steps", "2", "--no-eval"]
    return ["distill", *models, "--data", text, "--seq-len", "24", "--samples", "32", "--batch-size", "8"]


@pytest.mark.slow
def test_accelerate_launch_makes_the_bytes_of_one_process(
    student: Path, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    output, request = tmp_path / "launched", words(tiny("llama"), student, str(text))
    command = [
        *ACCELERATE,
        f"--main_process_port={free_port()}",
        "-m",
        "compress.cli",
        *request,
        "--output",
        str(output),
        "--json",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"artifact_id"') == 1, "one process speaks"
    usual = {"lora_rank": 4, "steps": 2, "data": str(text), "seq_len": 24, "samples": 32, "batch_size": 8}
    recipe = build_distill_recipe(DistillSettings(teacher=str(tiny("llama")), **usual))
    alone = pipeline.run(recipe, model=student, output=tmp_path / "alone").artifact
    assert Artifact.open(output).artifact_id == alone.artifact_id


@pytest.mark.slow
def test_what_ends_one_of_the_launched_is_one_error_line(
    student: Path, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    request = [*words(tiny("llama"), student, str(text)), "--output", str(tmp_path / "out")]
    commands = (["-m", "compress.cli", *request], ["-c", WITHOUT_ROOM])
    running = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, **meeting, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]
    (_, first), (_, second) = (each.communicate(timeout=300) for each in running)
    assert [each.returncode for each in running] == [4, 1]
    assert first.count("error:") == first.count("hint:") == 1
    assert "a helper process of the training ended: MemoryError: no room" in first
    assert "error:" not in second
    assert not (tmp_path / "out").exists()


def test_what_ends_a_helper_is_heard_of() -> None:
    store = dist.HashStore()
    store.set(helpers.order_key(1), helpers.OVER.decode())
    order = {"threads": 1, "answers": None, "model": "nowhere", "recipe": {"version": 1, "stages": []}}
    assert helpers.Helpers(store, []).lost() is None
    assert helper._helped(order, store, 0) is False
    assert "ValidationError" in str(helpers.Helpers(store, []).lost())


def test_how_many_share_is_how_many_were_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with joined():
        with shared_by(1):
            assert wanted() == 2
        with shared_by(2):
            assert wanted() == 2
        with pytest.raises(UserError, match="2 processes were launched, and --processes says 3"), shared_by(3):
            pass
    with shared_by(1):
        assert wanted() == 1, "a library that is called in each of them is not one process"

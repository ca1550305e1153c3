"""Bad models, texts, places and writers: each refused with its code, and what was there stays."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from compress.artifact.lock import FileLock
from compress.artifact.output import lock_path, resolve_output

QUICK = ("--samples", 4, "--seq-len", 64)
pytestmark = pytest.mark.usefixtures("one_thread")


def truncate(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def damage_header(model: Path) -> None:
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[8:12] = b"oops"
    weights.write_bytes(data)


def put_nan(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def remove_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def unknown_architecture(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "no-such-model"}))


def break_config(model: Path) -> None:
    (model / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("break_it", "code"),
    [
        (truncate, 5),
        (damage_header, 5),
        (put_nan, 4),
        (remove_weights, 2),
        (unknown_architecture, 2),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_bad_models_are_refused_and_leave_nothing(
    run: Callable, model: Path, tmp_path: Path, break_it: Callable[[Path], Any], code: int
) -> None:
    break_it(model)
    run("quantize", model, "--method", "rtn", "--output", tmp_path / "out", "--no-eval").refused(code)
    assert not (tmp_path / "out").exists()


def test_a_model_directory_with_a_broken_config_is_refused(run: Callable, model: Path, tmp_path: Path) -> None:
    break_config(model)
    result = run("quantize", model, "--method", "rtn", "--output", tmp_path / "out")
    result.refused(result.code)
    assert result.code in (2, 5)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b"", "is empty"),
        ("short.txt", b"Too short to calibrate on.", "windows of 64 tokens"),
        ("binary.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("missing.txt", None, "neither a packaged name nor a file"),
    ],
)
def test_bad_calibration_texts_are_refused(
    run: Callable, tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert said in run("quantize", "--method", "gptq", "--calib", name, *QUICK, "--output", "out").refused(2)
    assert not (tmp_path / "out").exists()


def test_bad_places_are_refused(run: Callable, made: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    for output in ("file", "file/below", "full", "."):
        run("quantize", "--method", "rtn", "--output", output).refused(2)
        budget = run("quantize", "--target-bits", 4, "--output", output)
        assert "measuring" not in budget.err, "an hour of measuring must not come before this"
        budget.refused(2)
    for source in ("nowhere", "file", "full"):
        run("quantize", source, "--method", "rtn", "--output", "out").refused(2)
        run("generate", source, "--prompt", "x").refused(2)
        run("eval", source).refused(2)
    run("quantize", made, "--method", "rtn", "--output", "out").refused(2)
    run("gate", made, "--policy", "missing.toml").refused(2)
    (tmp_path / "bad.toml").write_text('version = 1\n[[gate]]\nid = "a"\nkind = "kl_meen"\nmax = 1.0\n')
    assert "did you mean `kl_mean`?" in run("gate", made, "--policy", "bad.toml").refused(2)
    assert (tmp_path / "file").read_text() == (tmp_path / "full/mine.txt").read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_a_model_is_never_replaced_by_what_is_made_of_it(run: Callable, copy: Path) -> None:
    before = load_file(copy / "model.safetensors")
    for words in (("quantize", copy), ("run", "prune-distill-quantize", "--model", copy)):
        assert "is the artifact or model itself" in run(*words, "--output", copy, "--restart").refused(2)
    assert load_file(copy / "model.safetensors").keys() == before.keys()


def test_a_second_writer_is_refused(run: Callable, tmp_path: Path) -> None:
    output = resolve_output(tmp_path / "out")
    lock = FileLock(lock_path(output), output)
    try:
        run("quantize", "--method", "rtn", "--output", output).refused(2)
    finally:
        lock.release()
    assert run("quantize", "--method", "rtn", "--output", output, "--no-eval").code == 0


def test_a_full_disk_is_work_that_failed_and_the_run_resumes(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = []

    def full(descriptor: int) -> None:
        writes.append(descriptor)
        if len(writes) > 12:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        result = run("quantize", "--method", "rtn", "--output", "out", "--no-eval")
    assert "the disk is full" in result.refused(4)
    assert not (tmp_path / "out").exists()
    resumed = run("quantize", "--method", "rtn", "--output", "out", "--no-eval", "--json").json
    assert resumed["resumed_blocks"] > 0

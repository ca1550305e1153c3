"""The teacher's words, written down: as good as live, resumed, checked, refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress import pipeline
from compress.artifact import durable
from compress.artifact.canonical import sha256_file
from compress.artifact.journal import Journal
from compress.artifact.tensorfile import write_tensors
from compress.errors import IntegrityError, UserError, WorkError
from compress.pipeline import distill_teacher, teacher_cache
from compress.recipe import Recipe, parse_recipe
from tests.pipeline import harness


@pytest.fixture(scope="module")
def pair(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A teacher, and a student that is the teacher with its matrices a little off."""
    teacher = tiny("llama")
    return teacher, harness.a_little_off(teacher, tmp_path_factory.mktemp("pair") / "student")


def recipe(pair: tuple[Path, Path], text: Path, cache: Path | None, **given: Any) -> Recipe:
    stage: dict[str, Any] = {"kind": "distill", "teacher": str(pair[0]), "method": {"kind": "topk-kl", "k": 10}}
    stage |= {"steps": 4, "lora_rank": 0, "batch_size": 4, "cache": None if cache is None else str(cache)}
    stage["calibration"] = {"source": str(text), "samples": 56, "seq_len": 24}
    return parse_recipe({"model": str(pair[1]), "stages": [{**stage, **given}]})


def shards(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/shard-*.safetensors"))


@pytest.mark.parametrize("method", [{"kind": "topk-kl", "k": 10}, {"kind": "sampled-kl"}])
def test_cached_losses_are_the_live_ones_and_a_second_training_reads_them(
    method: dict[str, Any], pair: tuple[Path, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    live = pipeline.run(recipe(pair, text, None, method=method), output=tmp_path / "live").artifact
    cached = pipeline.run(recipe(pair, text, cache, method=method), output=tmp_path / "cached").artifact
    first, second = live.training(), cached.training()
    assert first is not None
    assert second is not None
    assert second["losses"] == pytest.approx(first["losses"], abs=1e-3)
    assert second["losses"] != first["losses"]
    stored = load_file(shards(cache)[0])
    per_token = sum(t.numel() * t.element_size() for t in stored.values()) / (20 * 2 * 23)
    assert per_token == teacher_cache.bytes_per_token(10, 259) == 40
    before = {path: path.stat().st_mtime_ns for path in shards(cache)}
    said: list[str] = []
    right = distill_teacher.Teacher.logits

    def listening(self: distill_teacher.Teacher, key: str, ids: torch.Tensor) -> torch.Tensor:
        said.append(key)
        return right(self, key, ids)

    monkeypatch.setattr(distill_teacher.Teacher, "logits", listening)
    pipeline.run(recipe(pair, text, cache, method=method, learning_rate=1e-3), output=tmp_path / "other")
    assert {path: path.stat().st_mtime_ns for path in shards(cache)} == before
    assert sum(key.startswith("train") for key in said) == teacher_cache.CHECKED_CHUNKS


def test_a_writer_that_was_stopped_goes_on_and_damage_is_mended(
    pair: tuple[Path, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_cache, "SHARD_CHUNKS", 8)
    whole, cache = tmp_path / "whole", tmp_path / "cache"
    pipeline.run(recipe(pair, text, whole), output=tmp_path / "undisturbed")
    monkeypatch.setattr(durable, "step", harness.failing_at("before write shard-00001.safetensors"))
    with pytest.raises(WorkError, match="disk is full"):
        pipeline.run(recipe(pair, text, cache), output=tmp_path / "out")
    monkeypatch.setattr(durable, "step", lambda label: None)
    assert len(shards(cache)) == 1
    pipeline.run(recipe(pair, text, cache), output=tmp_path / "out")
    assert [sha256_file(path) for path in shards(cache)] == [sha256_file(path) for path in shards(whole)]
    damaged = shards(cache)[2]
    content = damaged.read_bytes()
    damaged.unlink()
    damaged.write_bytes(content[:-1] + b"\0")
    pipeline.run(recipe(pair, text, cache), output=tmp_path / "again")
    assert [sha256_file(path) for path in shards(cache)] == [sha256_file(path) for path in shards(whole)]


def test_a_cache_that_says_something_else_is_refused(pair: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    pipeline.run(recipe(pair, text, cache), output=tmp_path / "out")
    (file,) = shards(cache)
    stored = {name: tensor.clone() for name, tensor in load_file(file).items()}
    file.unlink()
    _, sha256 = write_tensors(file, {**stored, "log_probabilities": stored["log_probabilities"] * 0.5})
    journal = Journal(file.parent / "shards.jsonl")
    journal.keep(0)
    journal.append({"file": file.name, "sha256": sha256})
    with pytest.raises(IntegrityError, match="does not hold what"):
        pipeline.run(recipe(pair, text, cache), output=tmp_path / "again")


def test_too_many_bytes_per_token_and_other_losses_are_refused(
    pair: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="256 bytes per token"):
        pipeline.run(
            recipe(pair, text, tmp_path / "cache", method={"kind": "topk-kl", "k": 64}), output=tmp_path / "out"
        )
    assert not (tmp_path / "cache").exists()
    with pytest.raises(UserError, match="a few tokens"):
        recipe(pair, text, tmp_path / "cache", method="jsd")

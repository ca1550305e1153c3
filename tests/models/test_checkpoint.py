"""Reading a model directory: the same tensors as safetensors, sound digests, and every kind of damage refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.models.checkpoint import Checkpoint
from compress.models.safetensors_header import DTYPES


class TestReading:
    def test_tensors_equal_those_of_safetensors(self, model: Path) -> None:
        checkpoint = Checkpoint.open(model)
        expected = load_file(model / "model.safetensors")
        assert list(checkpoint.index) == sorted(expected)
        for name, tensor in expected.items():
            info = checkpoint.index[name]
            assert (info.dtype, info.shape, info.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
            assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.nbytes == sum(tensor.nbytes for tensor in expected.values())
        assert checkpoint.config == json.loads((model / "config.json").read_text())

    def test_shards_hold_the_same_tensors_as_one_file(self, model: Path, sharded: Path) -> None:
        whole, parts = Checkpoint.open(model), Checkpoint.open(sharded)
        assert list(whole.index) == list(parts.index)
        assert len({info.shard for info in parts.index.values()}) > 2
        assert all(torch.equal(whole.read(name), parts.read(name)) for name in whole.index)

    @pytest.mark.parametrize("dtype", sorted(DTYPES.values(), key=str))
    def test_every_dtype_and_odd_places(self, dtype: torch.dtype, tmp_path: Path) -> None:
        raw = torch.randint(0, 2, (5, 3), generator=torch.Generator().manual_seed(0))
        tensors = {
            "a": torch.ones(3, dtype=torch.uint8),
            "b": raw.to(dtype),
            "c": torch.zeros(0, 4),
            "d": torch.tensor(7),
        }
        (tmp_path / "config.json").write_text("{}")
        save_file(tensors, tmp_path / "model.safetensors")
        checkpoint = Checkpoint.open(tmp_path)
        for name, tensor in tensors.items():
            read = checkpoint.read(name)
            assert read.dtype == tensor.dtype
            assert read.shape == tensor.shape
            assert torch.equal(read.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))

    def test_a_misaligned_tensor_is_read(self, tmp_path: Path) -> None:
        values = torch.arange(6, dtype=torch.float32)
        _write(
            tmp_path, {"a": _entry("U8", [1], 0, 1), "b": _entry("F32", [6], 1, 25)}, b"\0" + values.numpy().tobytes()
        )
        assert torch.equal(Checkpoint.open(tmp_path).read("b"), values)

    def test_writing_into_a_tensor_reaches_neither_the_file_nor_another_reader(self, model: Path) -> None:
        checkpoint, name = Checkpoint.open(model), "model.norm.weight"
        before = (model / "model.safetensors").read_bytes()
        first = checkpoint.read(name)
        kept = first.clone()
        first.zero_()
        assert torch.equal(checkpoint.read(name), kept)
        assert (model / "model.safetensors").read_bytes() == before

    def test_reading_takes_no_anonymous_memory(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        save_file({"big": torch.ones(64 << 20, dtype=torch.uint8)}, tmp_path / "model.safetensors")
        checkpoint = Checkpoint.open(tmp_path)
        before = _anonymous_bytes()
        tensor = checkpoint.read("big")
        assert int(tensor[:: 1 << 12].sum(dtype=torch.int64)) == 16384  # touches every page
        assert _anonymous_bytes() - before < 16 << 20

    def test_many_tensors_can_be_open_at_once(self, tiny: Callable[..., Path]) -> None:
        checkpoint = Checkpoint.open(tiny("llama"))
        held = [checkpoint.read(name) for name in checkpoint.index for _ in range(10)]
        assert len(held) == 10 * len(checkpoint.index)


class TestDigests:
    def test_sha256_is_that_of_the_stored_bytes(self, model: Path) -> None:
        checkpoint = Checkpoint.open(model)
        for name, tensor in load_file(model / "model.safetensors").items():
            assert checkpoint.sha256(name) == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()

    def test_shards_and_whole_have_one_digest(self, model: Path, sharded: Path) -> None:
        shutil.copy(model / "config.json", sharded / "config.json")
        assert Checkpoint.open(model).digest() == Checkpoint.open(sharded).digest()

    def test_key_order_and_spacing_of_the_config_do_not_count(self, model: Path) -> None:
        before = Checkpoint.open(model).digest()
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=7))
        assert Checkpoint.open(model).digest() == before

    def test_any_change_of_the_model_changes_the_digest(self, model: Path) -> None:
        digests = {Checkpoint.open(model).digest()}
        tensors = load_file(model / "model.safetensors")
        flipped = {**tensors, "model.norm.weight": -tensors["model.norm.weight"]}
        renamed = {("model.norm.weigh" if k == "model.norm.weight" else k): v for k, v in tensors.items()}
        reshaped = {**tensors, "model.norm.weight": tensors["model.norm.weight"].reshape(2, -1)}
        recast = {**tensors, "model.norm.weight": tensors["model.norm.weight"].view(torch.int32)}
        for changed in (flipped, renamed, reshaped, recast):
            save_file(changed, model / "model.safetensors")
            digests.add(Checkpoint.open(model).digest())
        save_file(tensors, model / "model.safetensors")
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
        digests.add(Checkpoint.open(model).digest())
        assert len(digests) == 6

    def test_progress_counts_every_tensor(self, model: Path) -> None:
        events: list[Any] = []

        class Recorder:
            def begin(self, what: str, total: int) -> None:
                events.append(total)

            def advance(self, note: str = "") -> None:
                events.append(note)

            def end(self) -> None:
                events.append("end")

            def warn(self, message: str) -> None:
                raise AssertionError(message)

        checkpoint = Checkpoint.open(model)
        checkpoint.digest(Recorder())
        assert events == [len(checkpoint.index), *checkpoint.index, "end"]

    def test_the_tokenizer_digest_depends_on_the_tokenizer_alone(self, model: Path) -> None:
        before = Checkpoint.open(model).tokenizer_digest()
        (model / "generation_config.json").write_text("{}")
        (model / "chat_template.jinja").write_text("{{ messages }}")
        assert Checkpoint.open(model).tokenizer_digest() == before
        (model / "tokenizer.json").write_text((model / "tokenizer.json").read_text() + " ")
        assert Checkpoint.open(model).tokenizer_digest() != before

    def test_aux_files_are_neither_weights_nor_configuration_nor_code(self, model: Path) -> None:
        for name in ("LICENSE", "chat_template.jinja", "vocab.json", "modeling.py", "README.md", "recipe.yaml"):
            (model / name).write_text("x")
        (model / "compress_manifest.json").write_text("{}")
        names = {file.name for file in Checkpoint.open(model).aux_files()}
        assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"} <= names
        assert {"chat_template.jinja", "vocab.json"} <= names
        assert not names & {"config.json", "compress_manifest.json", "modeling.py", "README.md", "recipe.yaml"}
        assert not any(name.endswith((".safetensors", ".index.json")) for name in names)

    def test_an_artifact_still_opens(self, model: Path) -> None:
        assert not Checkpoint.open(model).is_artifact
        (model / "compress_manifest.json").write_text("{}")
        assert Checkpoint.open(model).is_artifact


def _entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def _write(directory: Path, header: Any, data: bytes) -> None:
    raw = json.dumps(header).encode()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    pytest.skip("needs /proc/self/status with RssAnon")

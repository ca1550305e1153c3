"""Every kind of directory that is no model, and every kind of damage, is refused with the right error."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compress.errors import IntegrityError, UserError
from compress.models.checkpoint import Checkpoint
from compress.models.safetensors_header import read_header


class TestNotAModel:
    def test_a_missing_path(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no model directory"):
            Checkpoint.open(tmp_path / "nothing")

    def test_a_file(self, model: Path) -> None:
        with pytest.raises(UserError, match="is a file"):
            Checkpoint.open(model / "model.safetensors")

    def test_no_config(self, model: Path) -> None:
        (model / "config.json").unlink()
        with pytest.raises(UserError, match=r"no config\.json"):
            Checkpoint.open(model)

    @pytest.mark.parametrize("text", ["", "{", "[]", "3", "\xff", "[" * 100_000])
    def test_a_config_that_is_no_json_object(self, text: str, model: Path) -> None:
        (model / "config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=r"config\.json"):
            Checkpoint.open(model)

    def test_pickled_weights(self, model: Path) -> None:
        (model / "model.safetensors").rename(model / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"pickle \(pytorch_model\.bin\)") as caught:
            Checkpoint.open(model)
        assert "safetensors" in caught.value.hint

    @pytest.mark.parametrize("name", ["adapter_model.safetensors", "model-q4.gguf"])
    def test_other_weights(self, name: str, model: Path) -> None:
        (model / "model.safetensors").rename(model / name)
        with pytest.raises(UserError, match=name):
            Checkpoint.open(model)


class TestDamage:
    @pytest.mark.parametrize("keep", [0, 7, 8, 100, 0.5, -1])
    def test_a_truncated_shard(self, keep: float, model: Path) -> None:
        whole = (model / "model.safetensors").read_bytes()
        size = int(keep * len(whole)) if isinstance(keep, float) else keep
        (model / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(IntegrityError, match=r"model\.safetensors") as caught:
            Checkpoint.open(model)
        assert "again" in caught.value.hint

    def test_bytes_behind_the_last_tensor(self, model: Path) -> None:
        with (model / "model.safetensors").open("ab") as file:
            file.write(b"\0")
        with pytest.raises(IntegrityError, match="tensors end at byte"):
            Checkpoint.open(model)

    @pytest.mark.parametrize(
        ("header", "words"),
        [
            ([], "not a JSON object"),
            ({"a": 3}, "dtype, shape and data_offsets"),
            ({"a": {"dtype": "F32", "shape": [2]}}, "dtype, shape and data_offsets"),
            ({"a": {"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}}, "unknown dtype"),
            ({"\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, "not printable"),
            ({"\x1b[2J": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, "not printable"),
            ({"a": {"dtype": [], "shape": [2], "data_offsets": [0, 8]}}, "unknown dtype"),
            ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, "impossible shape"),
            ({"a": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}}, "impossible shape"),
            ({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, "impossible shape"),
            ({"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}, "impossible shape"),
            ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, "claims the range"),
            ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]}}, "impossible shape"),
            ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, "claims the range"),
            ({"a": {"dtype": "F32", "shape": [1 << 61, 1 << 61], "data_offsets": [0, 8]}}, "claims the range"),
            ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "where byte"),
            (
                {
                    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                    "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
                },
                "where byte",
            ),
            ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "tensors end at byte"),
        ],
    )
    def test_a_header_that_contradicts_itself_or_the_file(self, header: Any, words: str, tmp_path: Path) -> None:
        _write(tmp_path, header, bytes(8))
        with pytest.raises(IntegrityError, match=words):
            Checkpoint.open(tmp_path)

    @pytest.mark.parametrize("raw", [b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": {}, "a": {}}', b""])
    def test_a_header_that_is_no_json(self, raw: bytes, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
        with pytest.raises(IntegrityError, match="not valid JSON"):
            Checkpoint.open(tmp_path)

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_no_damage_of_the_header_escapes_as_a_traceback(self, data: st.DataObject, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, path)
        raw = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        raw = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
        path.write_bytes(raw)
        try:
            infos = read_header(path)
        except IntegrityError:
            return
        assert sum(info.nbytes for info in infos.values()) < len(raw)
        assert all(info.offset + info.nbytes <= len(raw) for info in infos.values())

    def test_the_index_names_a_missing_shard(self, sharded: Path) -> None:
        gone = sorted(sharded.glob("*.safetensors"))[1]
        gone.unlink()
        with pytest.raises(IntegrityError, match=gone.name):
            Checkpoint.open(sharded)

    def test_the_index_names_a_tensor_that_its_shard_lacks(self, sharded: Path) -> None:
        _change_index(sharded, lambda shards: {**shards, "model.ghost.weight": next(iter(shards.values()))})
        with pytest.raises(IntegrityError, match=r"model\.ghost\.weight"):
            Checkpoint.open(sharded)

    def test_the_index_names_the_wrong_shard(self, sharded: Path) -> None:
        def swap(shards: dict[str, str]) -> dict[str, str]:
            other = next(shard for shard in shards.values() if shard != shards["model.norm.weight"])
            return {**shards, "model.norm.weight": other}

        _change_index(sharded, swap)
        with pytest.raises(IntegrityError, match=r"model\.norm\.weight"):
            Checkpoint.open(sharded)

    @pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "pytorch_model.bin", 3, None])
    def test_the_index_leads_elsewhere(self, shard: Any, sharded: Path) -> None:
        _change_index(sharded, lambda shards: {**shards, "model.norm.weight": shard})
        with pytest.raises(IntegrityError, match="weight_map"):
            Checkpoint.open(sharded)

    def test_one_tensor_in_two_shards(self, sharded: Path) -> None:
        first, second = sorted(sharded.glob("*.safetensors"))[:2]
        tensors = load_file(second)
        name = next(iter(load_file(first)))
        save_file({**tensors, name: torch.ones(2)}, second)
        with pytest.raises(IntegrityError, match="both"):
            Checkpoint.open(sharded)

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}'])
    def test_a_damaged_index(self, text: str, sharded: Path) -> None:
        (sharded / "model.safetensors.index.json").write_text(text)
        with pytest.raises(IntegrityError, match=r"index\.json"):
            Checkpoint.open(sharded)

    def test_a_shard_cut_while_it_is_hashed(self, model: Path) -> None:
        checkpoint = Checkpoint.open(model)
        whole = (model / "model.safetensors").read_bytes()
        (model / "model.safetensors").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(IntegrityError, match="cut short"):
            checkpoint.digest()


def _write(directory: Path, header: Any, data: bytes) -> None:
    raw = json.dumps(header).encode()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def _change_index(directory: Path, change: Callable[[dict[str, str]], dict[str, Any]]) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "weight_map": change(index["weight_map"])}))

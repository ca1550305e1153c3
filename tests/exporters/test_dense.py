"""Dense exports: plain transformers loads them whole, and they compute what the packed artifact stands for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import compress
from compress.artifact import durable
from compress.artifact.reader import Artifact
from compress.artifact.verify import verify
from compress.errors import IntegrityError, UserError, WorkError
from compress.exporters.dense import PROVENANCE_NAME, export_dense
from tests.tiny_models import FAMILIES, tiny_model, tiny_tokens


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def artifact_of(model_type: str, place: Path, symmetric: bool = False) -> Artifact:
    source = tiny_model(model_type, place / "source")
    output = place / "artifact"
    return compress.quantize(source, "rtn", 4, group_size=32, symmetric=symmetric, output=output, evaluate=False)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_transformers_loads_the_export_and_computes_the_same(model_type: str, tmp_path: Path) -> None:
    artifact = artifact_of(model_type, tmp_path)
    made = export_dense(artifact.path, tmp_path / "dense")
    model, report = AutoModelForCausalLM.from_pretrained(made.path, output_loading_info=True, dtype=torch.float32)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = tiny_tokens(2, 24)
    with torch.no_grad():
        dense = model.eval()(tokens).logits
        source = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32).eval()(tokens).logits
    torch.testing.assert_close(dense, compress.load(artifact.path).score(tokens), rtol=1e-5, atol=1e-5)
    assert (dense - source).abs().max() > 1e-3, "the export must be of the quantised model"


def test_shards_hold_what_one_file_holds(tmp_path: Path) -> None:
    artifact = artifact_of("llama", tmp_path)
    whole = export_dense(artifact.path, tmp_path / "whole")
    sharded = export_dense(artifact.path, tmp_path / "sharded", max_shard_bytes=100_000)
    index = json.loads((tmp_path / "sharded/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert len(index["weight_map"]) == whole.tensors == sharded.tensors
    one, many = (AutoModelForCausalLM.from_pretrained(made.path).state_dict() for made in (whole, sharded))
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_the_export_names_its_artifact_and_is_none(tmp_path: Path) -> None:
    artifact = artifact_of("llama", tmp_path)
    made = export_dense(artifact.path, tmp_path / "dense")
    assert json.loads((made.path / PROVENANCE_NAME).read_text())["artifact_id"] == artifact.artifact_id
    with pytest.raises(UserError):
        Artifact.open(made.path)
    assert (made.path / "tokenizer.json").read_bytes() == (tmp_path / "source/tokenizer.json").read_bytes()


def test_what_is_in_the_way_stays(tmp_path: Path) -> None:
    artifact = artifact_of("llama", tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mine").write_text("mine")
    with pytest.raises(UserError, match="already holds something"):
        export_dense(artifact.path, tmp_path / "taken")
    assert (tmp_path / "taken/mine").read_text() == "mine"


def test_a_restart_replaces_and_keeps_what_was_no_artifact(tmp_path: Path) -> None:
    artifact = artifact_of("llama", tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mine").write_text("mine")
    made = export_dense(artifact.path, tmp_path / "taken", restart=True)
    assert made.kept_aside == tmp_path / "taken.replaced-1"
    assert (made.kept_aside / "mine").read_text() == "mine"
    assert (made.path / PROVENANCE_NAME).is_file()
    with pytest.raises(UserError, match="is the artifact or model itself"):
        export_dense(artifact.path, artifact.path, restart=True)
    assert verify(artifact.path).ok


def test_a_damaged_artifact_is_not_exported(tmp_path: Path) -> None:
    artifact = artifact_of("llama", tmp_path)
    data = bytearray((artifact.path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (artifact.path / "model.safetensors").write_bytes(data)
    with pytest.raises(IntegrityError):
        export_dense(artifact.path, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_an_export_that_fails_leaves_no_output_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = artifact_of("llama", tmp_path)

    def fail(label: str) -> None:
        if label.startswith("before fsync config.json"):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(durable, "step", fail)
        with pytest.raises(WorkError, match="disk is full"):
            export_dense(artifact.path, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
    assert (tmp_path / ".dense.export/model.safetensors").exists()
    assert export_dense(artifact.path, tmp_path / "dense").tensors > 0
    assert not (tmp_path / ".dense.export").exists()


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "model.safetensors"])
def test_a_directory_that_only_has_the_name_of_an_unfinished_export_stays(name: str, tmp_path: Path) -> None:
    artifact = artifact_of("llama", tmp_path)
    mine = tmp_path / ".dense.export"
    mine.mkdir()
    (mine / name).write_text("mine")
    with pytest.raises(UserError, match="is in the way"):
        export_dense(artifact.path, tmp_path / "dense")
    assert (mine / name).read_text() == "mine"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".dense.export", "artifact", "source"]


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    artifact = artifact_of("llama", tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="which is a file"):
        export_dense(artifact.path, tmp_path / "file/sub")

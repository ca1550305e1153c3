"""`verify` must find every change: these tests make one at a time and fail if it stays silent."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.artifact.attach import attach, attach_eval
from compress.artifact.manifest import Manifest
from compress.artifact.reader import Artifact
from compress.artifact.verify import require_sound, verify
from compress.errors import IntegrityError, UserError
from tests.artifact import producer

MANIFEST = "compress_manifest.json"
SHARD = "model-00001-of-00002.safetensors"
FILES = [
    "README.md",
    MANIFEST,
    "config.json",
    "eval.json",
    "layers.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "recipe.yaml",
    "samples.jsonl.gz",
    "tokenizer.json",
]


@pytest.fixture
def scored(finished: Path) -> Path:
    """A finished artifact with scores and samples attached."""
    attach_eval(finished, {"summary": {"kl_mean": {"estimate": 0.02}}}, samples=b"\x1f\x8b not really gzip")
    return finished


def test_a_finished_artifact_verifies(scored: Path) -> None:
    report = verify(scored)
    assert report.ok, report.problems
    assert report.problems == []
    assert report.files == len(FILES)
    assert report.bytes == sum(file.stat().st_size for file in scored.iterdir())
    assert report.artifact_id == Artifact.open(scored).artifact_id
    require_sound(scored)


def test_the_list_of_files_is_complete(scored: Path) -> None:
    assert sorted(file.name for file in scored.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_found(scored: Path, name: str) -> None:
    file = scored / name
    whole = file.read_bytes()
    chance = random.Random(name)
    positions = {0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 2, len(whole) - 1}
    positions |= {chance.randrange(len(whole)) for _ in range(60)}
    for position in sorted(p for p in positions if p < len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        problems = verify(scored).problems
        assert name in {problem.file for problem in problems}, (name, position)
    file.write_bytes(whole)
    assert verify(scored).ok


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["cut", "longer", "empty"])
def test_another_length_is_found(scored: Path, name: str, how: str) -> None:
    file = scored / name
    data = file.read_bytes()
    file.write_bytes({"cut": data[:-1], "longer": data + b"\n", "empty": b""}[how])
    assert name in {problem.file for problem in verify(scored).problems}


@pytest.mark.parametrize("name", [name for name in FILES if name != MANIFEST])
def test_a_missing_file_is_found(scored: Path, name: str) -> None:
    (scored / name).unlink()
    assert [(problem.file, problem.what) for problem in verify(scored).problems] == [(name, "missing")]


def test_without_its_manifest_it_is_no_artifact(scored: Path) -> None:
    (scored / MANIFEST).unlink()
    with pytest.raises(UserError, match="is not an artifact"):
        verify(scored)


@pytest.mark.parametrize("name", ["notes.txt", "pytorch_model.bin", "model.safetensors", ".hidden", "folder"])
def test_an_unknown_file_is_found(scored: Path, name: str) -> None:
    if name == "folder":
        (scored / name).mkdir()
    else:
        (scored / name).write_bytes(b"x")
    assert [(problem.file, problem.what) for problem in verify(scored).problems] == [
        (name, "not listed in the manifest")
    ]


def remove(tensors: dict[str, torch.Tensor]) -> str:
    name = sorted(tensors)[1]
    del tensors[name]
    return f"tensor {name} is missing"


def add(tensors: dict[str, torch.Tensor]) -> str:
    tensors["mtp.weight"] = torch.zeros(2)
    return "tensor mtp.weight is extra"


def rename(tensors: dict[str, torch.Tensor]) -> str:
    tensors["other"] = tensors.pop("model.layers.0.norm.weight")
    return "tensor model.layers.0.norm.weight is missing"


def reshape(tensors: dict[str, torch.Tensor]) -> str:
    name = "model.layers.0.q_proj.weight_scale"
    tensors[name] = tensors[name].reshape(-1, 1).contiguous()
    return f"tensor {name} is BF16 [64, 1], the manifest says BF16 [32, 2]"


def retype(tensors: dict[str, torch.Tensor]) -> str:
    name = "model.layers.0.norm.weight"
    tensors[name] = tensors[name].view(torch.float16)
    return f"tensor {name} is F16 [32], the manifest says BF16 [32]"


def change(tensors: dict[str, torch.Tensor]) -> str:
    name = "model.layers.0.q_proj.weight_packed"
    tensors[name][3, 1] += 1
    return f"the bytes of tensor {name} are not what the manifest says"


def swap(tensors: dict[str, torch.Tensor]) -> str:
    a, b = "model.layers.0.q_proj.weight_packed", "model.layers.0.o_proj.weight_packed"
    tensors[a], tensors[b] = tensors[b], tensors[a]
    return f"the bytes of tensor {b} are not what the manifest says"


@pytest.mark.parametrize("edit", [remove, add, rename, reshape, retype, change, swap])
def test_an_edited_tensor_is_named(scored: Path, edit: Callable[[dict[str, torch.Tensor]], str]) -> None:
    tensors = load_file(scored / SHARD)
    expected = edit(tensors)
    save_file(tensors, scored / SHARD, metadata={"format": "pt"})
    problems = verify(scored).problems
    assert expected in [problem.what for problem in problems if problem.file == SHARD]
    with pytest.raises(IntegrityError, match="is damaged"):
        require_sound(scored)


def test_the_same_tensors_in_another_spelling_are_found(scored: Path) -> None:
    tensors = load_file(scored / SHARD)
    save_file(tensors, scored / SHARD, metadata={"format": "pt", "note": "x" * 8})
    assert SHARD in {problem.file for problem in verify(scored).problems}


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all scalars (and empty containers) in a JSON value."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from leaves(item, (*path, key))
    else:
        yield path


def edited(value: Any) -> Any:
    """Another value of the same form, so that only the digests can tell."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str) and len(value) == 64:
        return ("0" if value[0] != "0" else "1") + value[1:]
    if isinstance(value, str):
        return value + "x"
    return "something" if value is None else {"x": 1} if isinstance(value, dict) else ["x"]


def test_an_edit_to_any_field_of_the_manifest_is_found(scored: Path) -> None:
    original = json.loads((scored / MANIFEST).read_bytes())
    paths = list(leaves(original))
    fields = {path[0] for path in paths}
    assert fields == set(Manifest.model_fields)
    for path in paths:
        changed = json.loads(json.dumps(original))
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = edited(inner[path[-1]])
        (scored / MANIFEST).write_text(json.dumps(changed))
        _, faults = Manifest.examine((scored / MANIFEST).read_bytes())
        assert faults, path
        assert "spelled" not in faults[0], path
        with pytest.raises(IntegrityError):
            Artifact.open(scored)


@pytest.mark.parametrize("path", [("sizes", "bytes"), ("fallbacks",), ("recipe", "seed"), ("calibration", "samples")])
def test_a_removed_or_unknown_field_is_found(scored: Path, path: tuple[str, ...]) -> None:
    original = (scored / MANIFEST).read_bytes()
    changed = json.loads(original)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    (scored / MANIFEST).write_text(json.dumps(changed))
    assert MANIFEST in {problem.file for problem in verify(scored).problems}
    changed = json.loads(original)
    changed["extra"] = 1
    (scored / MANIFEST).write_text(json.dumps(changed))
    assert "extra" in str(verify(scored).problems)


def test_the_same_manifest_in_another_spelling_is_found(scored: Path) -> None:
    (scored / MANIFEST).write_text(json.dumps(json.loads((scored / MANIFEST).read_bytes())))
    assert "spelled" in verify(scored).problems[0].what


def resealed(scored: Path, **update: Any) -> None:
    """Write a manifest with changed fields whose own digests are right again."""
    manifest = Artifact.open(scored).manifest.model_copy(update=update)
    manifest = manifest.model_copy(update={"artifact_id": manifest.expected_artifact_id()})
    (scored / MANIFEST).write_bytes(manifest.with_attachments({}).to_bytes())


def test_a_resealed_manifest_must_still_agree_with_the_files(scored: Path) -> None:
    manifest = Artifact.open(scored).manifest
    name = "model.layers.0.norm.weight"
    record = manifest.tensors[name]
    for changed in (
        record.model_copy(update={"sha256": "a" * 64}),
        record.model_copy(update={"shape": [16, 2]}),
        record.model_copy(update={"dtype": "F16"}),
        record.model_copy(update={"file": "model-00009-of-00009.safetensors"}),
    ):
        resealed(scored, tensors={**manifest.tensors, name: changed})
        assert name in str(verify(scored).problems)
    resealed(scored, tensors={key: value for key, value in manifest.tensors.items() if key != name})
    assert f"tensor {name} is extra" in str(verify(scored).problems)
    resealed(scored, tensors=manifest.tensors, ledger={k: v for k, v in manifest.ledger.items() if k != name})
    assert f"output tensor {name} comes from no source tensor" in str(verify(scored).problems)
    resealed(scored, ledger=manifest.ledger)
    assert verify(scored).ok


@pytest.mark.parametrize("name", ["../tokenizer.json", "/etc/hostname", "a/b", "..", ".hidden", ""])
def test_a_manifest_cannot_point_outside(scored: Path, name: str) -> None:
    original = json.loads((scored / MANIFEST).read_bytes())
    tensor = next(iter(original["tensors"]))
    for changed in (
        {**original, "files": {**original["files"], name: original["files"]["tokenizer.json"]}},
        {**original, "attachments": {**original["attachments"], name: "a" * 64}},
        {**original, "tensors": {**original["tensors"], tensor: {**original["tensors"][tensor], "file": name}}},
    ):
        (scored / MANIFEST).write_text(json.dumps(changed))
        assert "cannot be read" in verify(scored).problems[0].what


def test_scores_that_nest_too_deeply_are_only_damaged(scored: Path) -> None:
    (scored / "eval.json").write_text("[" * 100_000)
    assert "eval.json" in {problem.file for problem in verify(scored).problems}


def test_scores_of_another_artifact_are_found(scored: Path) -> None:
    attach(scored, {"eval.json": json.dumps({"artifact_id": Artifact.open(scored).artifact_id}).encode()})
    assert verify(scored).ok
    attach(scored, {"eval.json": b'{"artifact_id": "1234"}'})
    assert "artifact 1234" in str(verify(scored).problems)


def test_files_of_another_artifact_are_found(scored: Path, tmp_path: Path, tokenizer: Path) -> None:
    other = producer.run(tmp_path / "other", tokenizer, recipe=producer.recipe(damp=0.5), recipe_yaml="seed: 1\n")
    shutil.copy(other.artifact.path / "recipe.yaml", scored / "recipe.yaml")
    assert {problem.file for problem in verify(scored).problems} == {"recipe.yaml"}

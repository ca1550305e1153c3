"""`diff` names what differs, and nothing else, with figures that are checked against torch."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.artifact.attach import attach_eval
from compress.artifact.diff import Change, changes, diff
from compress.artifact.tensor_diff import tensor_changes
from compress.artifact.tensorfile import read_header
from compress.errors import IntegrityError, UserError
from compress.formats.int_packed import pack_bits
from tests.artifact import producer

Produce = Callable[..., producer.Outcome]
SHARD = "model-00001-of-00002.safetensors"


def test_two_runs_of_a_recipe_do_not_differ(finished: Path, tmp_path: Path, produce: Produce) -> None:
    other = produce(tmp_path / "out", max_shard_bytes=1 << 30).artifact.path
    found = diff(finished, other)
    assert found.same
    assert found.recipe == found.tensors == found.config == found.files == found.made_with == found.scores == []
    assert [change.where for change in found.sizes] == ["bytes", "ratio_to_parent", "ratio_to_root"]


def test_every_difference_is_named(finished: Path, tmp_path: Path, produce: Produce, tokenizer: Path) -> None:
    template = tmp_path / "chat_template.jinja"
    template.write_text("x")
    other = produce(
        tmp_path / "out",
        recipe=producer.recipe(damp=0.02),
        config={"model_type": "llama", "hidden_size": 32, "rope": {"theta": 1.0}},
        environment={"torch": "3"},
        aux_files=[tokenizer, template],
    ).artifact.path
    attach_eval(other, {"summary": {"kl_mean": {"estimate": 0.5}}})
    found = diff(finished, other)
    assert not found.same
    assert found.recipe == [Change("stages.0.method.damp_frac", 0.01, 0.02)]
    assert found.config == [Change("rope", None, {"theta": 1.0})]
    assert found.made_with == [Change("environment.torch", "2", "3")]
    assert [(c.where, c.a) for c in found.files] == [("chat_template.jinja", None)]
    assert found.scores == [Change("kl_mean", None, 0.5)]
    assert found.tensors == []


def edit(finished: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A plain model directory with the tensors of the artifact's first shard, changed."""
    path = tmp_path / "plain"
    path.mkdir()
    shutil.copy(finished / "config.json", path)
    for file in finished.glob("*.safetensors"):
        tensors = load_file(file)
        if file.name == SHARD:
            change(tensors)
        save_file(tensors, path / file.name)
    return path


def test_tensors_against_a_plain_directory(finished: Path, tmp_path: Path) -> None:
    norm = "model.layers.0.norm.weight"
    scale = "model.layers.0.q_proj.weight_scale"
    expected = {}

    def change(tensors: dict[str, torch.Tensor]) -> None:
        before = tensors[scale].clone()
        tensors[scale][3] *= 1.5
        expected["relative"] = float((tensors[scale].double() - before.double()).norm() / before.double().norm())
        tensors[norm] = tensors[norm][:-1].contiguous()
        tensors["mtp.weight"] = torch.ones(2)
        del tensors["model.layers.0.flag"]

    found = diff(finished, edit(finished, tmp_path, change))
    assert [(c.name, c.kind) for c in found.tensors] == [
        ("model.layers.0.flag", "removed"),
        (norm, "reshaped"),
        (scale, "changed"),
        ("mtp.weight", "added"),
    ]
    assert found.tensors[1].a == "BF16 [32]"
    assert found.tensors[1].b == "BF16 [31]"
    assert found.tensors[2].relative_change == pytest.approx(expected["relative"], rel=1e-9)
    assert found.recipe == []
    assert [c.where for c in found.sizes if c.b is not None] == ["bytes"]


def test_a_packed_linear_against_its_plain_weight(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "source"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama", "hidden_size": 32}')
    source = {name: tensor.clone() for name, tensor in producer.source().items()}
    save_file(source, path / "model.safetensors")
    found = diff(path, finished)
    repacked = [c.name for c in found.tensors if c.kind == "repacked"]
    assert repacked == [f"model.layers.{b}.{linear}" for b in range(5) for linear in ("o_proj", "q_proj")]
    assert found.tensors[1].a == "weight BF16 [32, 32]" or found.tensors[0].kind == "removed"
    assert {(c.name, c.kind) for c in found.tensors if c.kind != "repacked"} == {
        ("lm_head.weight", "removed"),
        ("model.rotary.inv_freq", "removed"),
    }


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_the_share_of_differing_codes(tmp_path: Path, bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    a = torch.randint(low, high, (70, 48), generator=generator, dtype=torch.int8)
    b = torch.where(torch.rand(70, 48, generator=generator) < 0.2, torch.randint(low, high, (70, 48)).to(torch.int8), a)
    for name, codes in (("a", a), ("b", b)):
        stored = {"x.weight_packed": pack_bits(codes, bits), "x.weight_shape": torch.tensor([70, 48])}
        save_file(stored, tmp_path / name)
    (change,) = tensor_changes(read_header(tmp_path / "a"), read_header(tmp_path / "b"), {}, {})
    assert change.codes_differing == pytest.approx(float((a != b).float().mean()), abs=1e-6)
    assert 0.1 < float((a != b).float().mean()) < 0.3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_relative_change_of_a_float_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    a = torch.randn(40, 30, generator=torch.Generator().manual_seed(1)).to(dtype)
    b = (a * 1.25).to(dtype)
    save_file({"w": a}, tmp_path / "a")
    save_file({"w": b}, tmp_path / "b")
    (change,) = tensor_changes(read_header(tmp_path / "a"), read_header(tmp_path / "b"), {}, {})
    assert change.relative_change == pytest.approx(
        float((a.double() - b.double()).norm() / a.double().norm()), rel=1e-9
    )


def test_a_change_of_integers_has_no_figure(tmp_path: Path) -> None:
    save_file({"w": torch.tensor([1, 2])}, tmp_path / "a")
    save_file({"w": torch.tensor([1, 3])}, tmp_path / "b")
    (change,) = tensor_changes(read_header(tmp_path / "a"), read_header(tmp_path / "b"), {}, {})
    assert (change.kind, change.codes_differing, change.relative_change) == ("changed", None, None)


def test_changes_in_json_values() -> None:
    a = {"x": [1, {"y": 2}], "same": {"deep": [1]}, "gone": 0}
    b = {"x": [1, {"y": 3}, 4], "same": {"deep": [1]}, "new": None}
    assert list(changes(a, b)) == [Change("gone", 0, None), Change("x.1.y", 2, 3), Change("x.2", None, 4)]


@pytest.mark.parametrize("what", ["nothing", "a file", "an empty directory"])
def test_what_is_no_model_is_refused(finished: Path, tmp_path: Path, what: str) -> None:
    path = tmp_path / "there"
    if what == "a file":
        path.write_text("x")
    elif what == "an empty directory":
        path.mkdir()
    with pytest.raises(UserError, match="neither an artifact nor a model directory"):
        diff(finished, path)


def test_a_damaged_artifact_is_not_the_same_model(finished: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(finished, tmp_path / "damaged"))
    weights = min(damaged.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    for pair in ((finished, damaged), (damaged, finished)):
        with pytest.raises(IntegrityError, match="damaged"):
            diff(*pair)


@pytest.mark.parametrize("config", ["{nope", "[]", "[" * 100_000])
def test_a_model_whose_config_is_no_object_is_refused(finished: Path, tmp_path: Path, config: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(min(finished.glob("*.safetensors")), model)
    (model / "config.json").write_text(config)
    with pytest.raises(UserError, match=r"config\.json is not"):
        diff(finished, model)

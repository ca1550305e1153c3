"""Lossless exports: the same numbers in another format, an artifact again, and refusals of what would be rounded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from compress import pipeline
from compress.artifact import durable
from compress.artifact.reader import Artifact
from compress.artifact.verify import verify
from compress.errors import UserError, WorkError
from compress.exporters.dense import export_dense
from compress.exporters.packed import export_packed
from compress.models.checkpoint import Checkpoint
from compress.recipe_build import Settings, build_recipe
from compress.runtime import transformers_backend
from compress.runtime.native_reader import packed_linears, stored_parts
from tests.tiny_models import tiny_model, tiny_tokens

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_hidden_layers": 2}
W4: dict[str, Any] = {"bits": 4, "group_size": 32}
Made = Callable[..., Artifact]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """made(**settings): an artifact of a small bfloat16 model, rounded to nearest."""

    def make(model_type: str = "llama", dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Artifact:
        source = tiny_model(model_type, tmp_path / "source", dtype=dtype, **(WIDE if model_type == "llama" else {}))
        recipe = build_recipe(Settings(method="rtn", **settings))[0]
        return pipeline.run(recipe, model=source, output=tmp_path / "artifact").artifact

    return make


def numbers(path: Path) -> dict[str, Tensor]:
    """(code - zero point) * scale of every packed linear in float64, where nothing is rounded; others as decoded."""
    checkpoint = Checkpoint.open(path)
    format, schemes = packed_linears(checkpoint)
    found = {}
    for name, scheme in schemes.items():
        q = format.unpack(stored_parts(checkpoint, name, format), scheme)
        if q.codes.dtype != torch.int8:
            found[name] = q.dequantize().double()
            continue
        scale = q.scale.double().unsqueeze(-1)
        codes = q.codes.double().unflatten(1, (scale.shape[1], -1))
        zero = 0 if q.zero_point is None else q.zero_point.double().unsqueeze(-1)
        found[name] = ((codes - zero) * scale).flatten(1)
    return found


CASES = [
    (W4, ["awq", "compressed-tensors"]),
    (W4, ["gptq", "awq", "gptq-v2", "compressed-tensors"]),
    ({**W4, "symmetric": False}, ["awq", "gptq-v2", "compressed-tensors"]),
    ({"bits": 3, "group_size": 64}, ["gptq-v2", "gptq", "compressed-tensors"]),
    ({"bits": 8, "group_size": "channel", "ignore": ["*down_proj"]}, ["gptq", "compressed-tensors"]),
    ({"scheme": "FP8_DYNAMIC"}, ["modelopt", "compressed-tensors"]),
    ({"scheme": "NVFP4A16"}, ["modelopt", "compressed-tensors"]),
    ({"scheme": "FP8_BLOCK", "ignore": ["*k_proj", "*v_proj", "*q_proj"]}, ["modelopt", "compressed-tensors"]),
]


@pytest.mark.parametrize(("settings", "chain"), CASES)
def test_numbers_stay_and_the_way_back_gives_the_same_bytes(
    settings: dict[str, Any], chain: list[str], made: Made, tmp_path: Path
) -> None:
    first = last = made(**settings)
    wanted = numbers(first.path)
    for step, to in enumerate(chain):
        last = export_packed(last.path, tmp_path / f"{step}-{to}", to).artifact
        assert packed_linears(Checkpoint.open(last.path))[0].name == to
        assert verify(last.path).problems == []
        found = numbers(last.path)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert [parent.digest for parent in last.manifest.parents[:1]] == [first.manifest.parents[0].digest]
        assert len(last.manifest.parents) == step + 2
        assert last.manifest.ledger.keys() == first.manifest.ledger.keys()
        stored = load_file(last.path / "model.safetensors")
        assert {name for entry in last.manifest.ledger.values() for name in entry.into} == stored.keys()
    assert (last.path / "model.safetensors").read_bytes() == (first.path / "model.safetensors").read_bytes()
    assert last.config["quantization_config"] == first.config["quantization_config"]
    assert last.manifest.sizes.bits_per_weight == first.manifest.sizes.bits_per_weight
    assert last.layers() == first.layers()


def test_the_export_tells_what_it_is(made: Made, tmp_path: Path) -> None:
    source = made(**W4)
    exported = export_packed(source.path, tmp_path / "gptq", "gptq").artifact
    last = exported.manifest.parents[-1]
    assert (last.digest, last.stage) == (source.artifact_id, "export to gptq")
    assert exported.artifact_id != source.artifact_id
    weights = {name: weight.numel() for name, weight in numbers(exported.path).items()}
    bits = sum(layer["bits_per_weight"] * weights[layer["name"]] for layer in exported.layers())
    assert exported.manifest.sizes.bits_per_weight == pytest.approx(bits / sum(weights.values()), abs=1e-6)
    assert [row["weight_sqnr_db"] for row in exported.layers()] == [row["weight_sqnr_db"] for row in source.layers()]
    again = export_packed(source.path, tmp_path / "gptq", "gptq")
    assert again.complete_already
    tokens = tiny_tokens(2, 12)
    found, wanted = (transformers_backend.load(a.path, device="cpu").score(tokens) for a in (exported, source))
    assert float((found - wanted).norm() / wanted.norm()) < 0.02  # float16 here and bfloat16 there, while decoding


def test_a_killed_export_goes_on(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made(**W4)
    whole = export_packed(source.path, tmp_path / "whole", "awq").artifact

    def fail(label: str) -> None:
        if label == "before write block-00001.safetensors":
            raise WorkError("the disk is full", "free some space")

    with monkeypatch.context() as patched:
        patched.setattr(durable, "step", fail)
        with pytest.raises(WorkError):
            export_packed(source.path, tmp_path / "other", "awq")
    assert not (tmp_path / "other").exists()
    resumed = export_packed(source.path, tmp_path / "other", "awq").artifact
    assert resumed.artifact_id == whole.artifact_id


@pytest.mark.parametrize(
    ("settings", "to", "match"),
    [
        ({**W4, "format": "gptq"}, "compressed-tensors", "stores scales in bfloat16, and a scale in float16"),
        (W4, "compressed-tensors", "in the format compressed-tensors already"),
        (W4, "modelopt", "modelopt is written for FP8"),
        ({"bits": 3, "group_size": 32}, "awq", "awq holds 4-bit codes"),
        ({"bits": 4, "group_size": 8, "symmetric": False}, "gptq", "less one, and one of them is 0"),
        ({"scheme": "NF4"}, "compressed-tensors", "has no layout for NF4"),
        (W4, "bitsandbytes", "bitsandbytes is written for NF4"),
        ({"dtype": torch.float32, **W4}, "awq", "stores scales in float16, and a scale in float32"),
        ({"model_type": "gpt2", **W4}, "gptq", "for our own reader"),
        ({**W4, "ignore": ["*layers.1.mlp.gate_proj", "*layers.1.mlp.up_proj"], "group_size": "channel"}, "awq", None),
    ],
)
def test_what_would_be_rounded_is_refused_before_anything_is_written(
    settings: dict[str, Any], to: str, match: str | None, made: Made, tmp_path: Path
) -> None:
    source = made(**settings)
    if match is None:  # linears left out go over by name
        exported = export_packed(source.path, tmp_path / "out", to).artifact
        assert "model.layers.1.mlp.up_proj" in exported.config["quantization_config"]["modules_to_not_convert"]
        return
    with pytest.raises(UserError, match=match):
        export_packed(source.path, tmp_path / "out", to)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["artifact", "source"]


def test_a_restart_replaces_an_artifact_and_leaves_nothing_beside_it(made: Made, tmp_path: Path) -> None:
    source = made(**W4)
    first = export_packed(source.path, tmp_path / "out", "awq").artifact
    with pytest.raises(UserError, match="already holds an artifact of another recipe or source"):
        export_packed(source.path, tmp_path / "out", "gptq")
    second = export_packed(source.path, tmp_path / "out", "gptq", restart=True)
    assert (second.artifact.artifact_id != first.artifact_id, second.kept_aside) == (True, None)
    assert second.artifact.config["quantization_config"]["quant_method"] == "gptq"
    assert export_dense(source.path, tmp_path / "out", restart=True).kept_aside is None
    assert sorted(entry.name for entry in tmp_path.iterdir() if ".lock" not in entry.name) == [
        "artifact",
        "out",
        "source",
    ]
    with pytest.raises(UserError, match="is the artifact or model itself"):
        export_packed(source.path, source.path, "gptq", restart=True)


@pytest.mark.parametrize(
    ("settings", "to", "hint"),
    [
        ({"scheme": "W8A8"}, "awq", "use --to dense"),
        ({"scheme": "FP8_DYNAMIC"}, "gptq", "use modelopt, or --to dense"),
        ({"bits": 3, "group_size": 32}, "awq", "use gptq or gptq-v2, or --to dense"),
    ],
)
def test_a_refusal_names_only_formats_that_carry_it(
    settings: dict[str, Any], to: str, hint: str, made: Made, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refused:
        export_packed(made(**settings).path, tmp_path / "out", to)
    assert refused.value.hint == hint


def test_only_what_is_quantised_is_packed(tmp_path: Path, made: Made) -> None:
    source = tiny_model("llama", tmp_path / "model", dtype=torch.bfloat16)
    with pytest.raises(UserError, match="not an artifact"):
        export_packed(source, tmp_path / "out", "awq")

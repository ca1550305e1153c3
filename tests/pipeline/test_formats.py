"""`format`: the same codes packed for other engines, read back by our own reader, sized as planned, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress import pipeline
from compress.artifact.verify import verify
from compress.errors import UserError
from compress.evaluation.reports.linear_values import read_values
from compress.evaluation.scheme import scheme_of
from compress.exporters.dense import export_dense
from compress.models.checkpoint import Checkpoint
from compress.recipe import load_recipe, parse_recipe
from compress.runtime import native_reader, transformers_backend
from compress.schemes import FIXED_SCHEMES
from tests.pipeline.harness import loaded_logits, recipe, tensors
from tests.tiny_models import tiny_tokens

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_hidden_layers": 2}
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("awq", {"bits": 4, "group_size": 64}, "w4a16-g64-asym"),
    ("awq", {"bits": 4, "group_size": "channel", "symmetric": False}, "w4a16-channel-asym"),
    ("gptq", {"bits": 4, "group_size": 32}, "w4a16-g32"),
    ("gptq", {"bits": 3, "group_size": 128}, "w3a16-g128"),
    ("gptq-v2", {"bits": 2, "group_size": 32, "symmetric": False}, "w2a16-g32-asym"),
    ("gptq-v2", {"bits": 8, "group_size": "channel"}, "w8a16-channel"),
    ("bitsandbytes", {"scheme": "NF4"}, "nf4"),
    ("modelopt", {"scheme": "FP8_STATIC"}, "fp8-static"),
    ("modelopt", {"scheme": "FP8_DYNAMIC"}, "fp8-dynamic"),
    ("modelopt", {"scheme": "NVFP4"}, "nvfp4"),
    ("modelopt", {"scheme": "NVFP4A16"}, "nvfp4a16"),
    ("modelopt", {"scheme": "FP8_BLOCK", "ignore": ["*k_proj", "*v_proj", "*q_proj"]}, "fp8-block"),
]


@pytest.mark.parametrize(
    ("name", "settings", "label"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_format_is_read_back_and_sized_as_planned(
    name: str, settings: dict[str, Any], label: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = tiny("llama", **WIDE)
    wanted = recipe("rtn", text, format=name, **settings)
    if settings.get("scheme") == "FP8_STATIC":
        wanted = recipe("rtn", text, format=name, calib=str(text), samples=4, seq_len=16, **settings)
    planned = pipeline.plan(wanted, model=source)
    assert planned.problems == []
    artifact = pipeline.run(wanted, model=source, output=tmp_path / "out").artifact
    assert verify(artifact.path).problems == []
    assert scheme_of(artifact.config) == label
    assert artifact.manifest.sizes.bits_per_weight == pytest.approx(planned.bits_per_weight, abs=1e-6)
    (values,) = read_values(artifact, ["model.layers.1.mlp.up_proj"])
    assert 0 < values.scale_middle <= values.scale_largest
    layers = [layer["bits_per_weight"] for layer in artifact.layers() if layer["scheme"]]
    assert min(layers) <= planned.bits_per_weight <= max(layers)
    assert load_recipe(artifact.path / "recipe.yaml").stages[0].format == name  # type: ignore[union-attr]
    tokens = tiny_tokens(2, 12)
    dense = transformers_backend.load(artifact.path, device="cpu").score(tokens)
    found = compress.load(artifact.path).score(tokens)
    if settings.get("scheme") in FIXED_SCHEMES and FIXED_SCHEMES[settings["scheme"]].inputs is not None:
        assert (found - dense).abs().amax(-1).min() < 1e-4  # a sum's last bit may turn a code, and what follows
    else:
        torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-4)
    exact = transformers_backend.load(source, device="cpu").score(tokens)
    lost = float((dense - exact).abs().max())
    assert 1e-4 < lost < 8.0, "the artifact computes something near its source, and not the same"


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
def test_formats_hold_the_codes_that_compressed_tensors_holds(
    method: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """The tiny model is float32, so only the scales differ: float16 in these formats."""
    source = tiny("llama", **WIDE)
    made = {
        name: pipeline.run(recipe(method, text, format=name), model=source, output=tmp_path / name).artifact.path
        for name in ("compressed-tensors", "awq", "gptq", "gptq-v2")
    }
    dense = {name: native_reader.load_dense_state(path) for name, path in made.items()}
    for weight, wanted in dense["awq"].items():
        assert torch.equal(wanted, dense["gptq"][weight])
        assert torch.equal(wanted, dense["gptq-v2"][weight])
        packed = dense["compressed-tensors"][weight].float()
        # Codes half way between two go the other way here and there, which is within the error of rounding itself.
        assert (wanted.float() - packed).norm() <= 0.3 * packed.norm()


def test_modelopt_says_its_layout_twice(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    wanted = recipe("rtn", text, scheme="FP8_DYNAMIC", format="modelopt", ignore=["*down_proj"])
    artifact = pipeline.run(wanted, model=tiny("llama", **WIDE), output=tmp_path / "out").artifact
    beside = json.loads((artifact.path / "hf_quant_config.json").read_text())["quantization"]
    inline = artifact.config["quantization_config"]
    assert beside["quant_algo"] == inline["quant_algo"] == "FP8_PER_CHANNEL_PER_TOKEN"
    assert beside["exclude_modules"] == inline["ignore"]
    assert "model.layers.1.mlp.down_proj" in inline["ignore"]
    assert "hf_quant_config.json" in artifact.manifest.files
    again = pipeline.run(wanted, model=tiny("llama", **WIDE), output=artifact.path)
    assert again.complete_already
    (artifact.path / "hf_quant_config.json").write_text("{}")
    assert [problem.file for problem in verify(artifact.path).problems] == ["hf_quant_config.json"] * 2


def test_layers_left_out_are_left_out_by_every_format(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source = tiny("llama", **WIDE)
    for name in ("awq", "gptq"):
        wanted = recipe("rtn", text, format=name, ignore=["model.layers.1.mlp.down_proj"])
        artifact = pipeline.run(wanted, model=source, output=tmp_path / name).artifact
        assert "model.layers.1.mlp.down_proj.weight" in tensors(artifact.path)
        found, schemes = native_reader.packed_linears(Checkpoint.open(artifact.path))
        assert found.name == name
        assert len(schemes) == 13
        text_of_config = json.dumps(artifact.config["quantization_config"])
        assert "down_proj" in text_of_config


@pytest.mark.parametrize(
    ("stage", "match"),
    [
        ({"format": "awq", "scheme": "W3A16"}, "awq holds 4-bit codes"),
        ({"format": "awq", "scheme": "W8A8"}, "awq holds integer weights alone, and not W8A8"),
        ({"format": "gptq", "scheme": "W5A16"}, "gptq holds codes of 2, 3, 4, 8 bits"),
        ({"format": "gptq", "scheme": "W4A16_ASYM"}, "a zero point of 0.*use gptq-v2"),
        ({"format": "gptq-v2", "scheme": "FP8_DYNAMIC"}, "gptq holds integer weights alone"),
        ({"format": "modelopt"}, "modelopt is written for FP8 and NVFP4 schemes, not for W4A16"),
        ({"format": "gguf"}, "format"),
        ({"format": "compressed-tensors", "scheme": "NF4"}, "compressed-tensors has no layout for NF4"),
        ({"format": "bitnet"}, "bitnet holds -1, 0 and 1, which ternary makes, and rtn does not"),
        ({"format": "compressed-tensors", "scheme": "W2A8", "method": "ternary"}, "has no layout for W2A8"),
        ({"format": "bitsandbytes"}, "bitsandbytes is written for NF4, not for W4A16"),
        ({"method": "gptq", "scheme": "NF4"}, "gptq rounds to integers and to blocks of floats, not to NF4"),
    ],
)
def test_recipes_of_what_a_format_cannot_hold_are_refused(stage: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        parse_recipe({"version": 1, "stages": [{"method": "rtn", **stage}]})


@pytest.mark.parametrize(
    ("model_type", "config", "settings", "match"),
    [
        ("gpt2", {}, {"format": "awq"}, "keeps transposed"),
        ("llama", {"intermediate_size": 164}, {"format": "awq", "group_size": 4}, "do not divide 164"),
        ("llama", {"intermediate_size": 164}, {"format": "gptq", "bits": 3, "group_size": 4}, "164 outputs of 3 bits"),
        ("llama", {}, {"format": "modelopt", "scheme": "FP8_BLOCK"}, "does not divide"),
        ("llama", WIDE, {"format": "modelopt", "scheme": "FP8_BLOCK"}, "whole tiles of 128 x 128"),
        ("llama", {"intermediate_size": 164}, {"scheme": "NF4"}, "the tile of NF4, 64, does not divide the width 164"),
        ("mixtral", WIDE | {"num_key_value_heads": 8}, {"scheme": "NF4"}, "its model keeps fused"),
    ],
)
def test_shapes_that_a_format_cannot_hold_are_planned_as_problems(
    model_type: str, config: dict[str, Any], settings: dict[str, Any], match: str, tiny: Callable[..., Path]
) -> None:
    wanted = recipe("rtn", None, **settings)
    planned = pipeline.plan(wanted, model=tiny(model_type, **config))
    assert any(match in problem for problem in planned.problems), planned.problems
    with pytest.raises(UserError):
        pipeline.run(wanted, model=tiny(model_type, **config))


def test_ternary_weights_load_in_transformers_as_bitnet(tiny: Callable[..., Path], tmp_path: Path) -> None:
    wanted = recipe("ternary", None, scheme="W2A8")
    assert "which loaders multiply" in pipeline.plan(wanted, model=tiny("llama", **WIDE)).problems[0]
    source = tiny("llama", **WIDE, attention_bias=False, mlp_bias=False)
    assert wanted.stages[0].format == "bitnet"  # type: ignore[union-attr]
    planned = pipeline.plan(wanted, model=source)
    artifact = pipeline.run(wanted, model=source, output=tmp_path / "out").artifact
    assert verify(artifact.path).problems == []
    assert scheme_of(artifact.config) == "w2a8"
    assert artifact.manifest.sizes.bits_per_weight == pytest.approx(planned.bits_per_weight, abs=1e-6)
    tokens = tiny_tokens(2, 12)
    ours = transformers_backend.load(artifact.path, device="cpu").score(tokens)
    with torch.compiler.set_stance("force_eager"):
        theirs = loaded_logits(artifact.path, tokens)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    dense = export_dense(artifact.path, tmp_path / "dense").path
    assert tensors(dense)["model.layers.0.mlp.up_proj.weight"].unique().numel() == 3

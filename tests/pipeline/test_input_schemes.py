"""Schemes that round inputs too: the artifact is the fake-quantised model in transformers and in our own runtime."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compress import pipeline
from compress.artifact import durable
from compress.artifact.reader import Artifact
from compress.artifact.verify import verify
from compress.errors import IntegrityError, UserError, WorkError
from compress.exporters.dense import export_dense
from compress.pipeline import fold, inputs
from compress.runtime.transformers_backend import load
from compress.schemes import FIXED_SCHEMES
from compress.types import BlockFloatScheme, Fp8Scheme
from tests.pipeline import harness
from tests.pipeline.harness import recipe
from tests.tiny_models import FAMILIES, tiny_tokens

EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v3")
# Conv1D; a flattened hidden state, whose tokens transformers then rounds with one scale; dense experts beside
# quantised linears, which transformers cannot fuse.
OURS_ONLY = ("gpt2", "opt", *EXPERTS)
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
CASES = [
    (name, "rtn")
    for name, scheme in FIXED_SCHEMES.items()  # block floats: test_block_floats.py; ternary codes: test_bitnet.py
    if scheme.inputs is not None and scheme.bits == 8 and not isinstance(scheme, BlockFloatScheme)
]
CASES += [(scheme, method) for scheme in ("W8A8", "W8A8_STATIC") for method in ("gptq", "smoothquant")]
CASES += [("FP8_STATIC", "smoothquant")]
Make = Callable[..., Artifact]


@pytest.fixture
def make(text: Path, tmp_path: Path) -> Make:
    """make(source, scheme, method, **settings): an artifact."""
    count = 0

    def made(source: Path, scheme: str, method: str = "rtn", **settings: object) -> Artifact:
        nonlocal count
        count += 1
        wanted = recipe(method, text, scheme=scheme, **settings)
        return pipeline.run(wanted, model=source, output=tmp_path / str(count) / "out").artifact

    return made


def check_loads(source: Path, artifact: Artifact, ours_only: bool = False) -> float:
    """Compares with the oracle; returns how far the logits moved from the source's."""
    tokens = tiny_tokens(2, 12)
    expected = harness.fake_quantized_logits(source, artifact, tokens)
    torch.testing.assert_close(load(artifact.path, device="cpu").score(tokens), expected, rtol=1e-5, atol=1e-5)
    if not ours_only:
        torch.testing.assert_close(harness.loaded_logits(artifact.path, tokens), expected, rtol=1e-5, atol=1e-5)
    return harness.distance(expected, harness.source_logits(source, tokens))


@pytest.mark.parametrize(("scheme", "method"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_fake_quantised_model(
    scheme: str, method: str, dtype: torch.dtype, tiny: Callable[..., Path], make: Make
) -> None:
    source = tiny("llama", dtype=dtype, **WIDE)
    artifact = make(source, scheme, method)
    # Smoothed channels use their calibrated ranges up, and these random tokens exceed them: static scales then clip.
    clipped = scheme.endswith("_STATIC") and method == "smoothquant"
    assert 0.001 < check_loads(source, artifact) < (0.4 if clipped else 0.2 if scheme.startswith("FP8") else 0.1)
    assert verify(artifact.path).problems == []
    check_layout(source, artifact, scheme)


def check_layout(source: Path, artifact: Artifact, name: str) -> None:
    """Tensors, sizes, ledger and reports follow from the scheme."""
    scheme, before, after = FIXED_SCHEMES[name], harness.tensors(source), harness.tensors(artifact.path)
    matrices = harness.block_matrices(before)
    bits = weights = 0
    for weight in matrices:
        out, width = before[weight].shape
        kept = {
            part: after[n] for part in ("weight", "weight_scale", "input_scale") if (n := _part(weight, part)) in after
        }
        assert kept["weight"].dtype == (torch.float8_e4m3fn if isinstance(scheme, Fp8Scheme) else torch.int8)
        assert kept["weight_scale"].dtype == before[weight].dtype
        assert ("input_scale" in kept) == name.endswith("_STATIC")
        assert artifact.manifest.ledger[weight].action == "quantized"
        assert sorted(artifact.manifest.ledger[weight].into) == sorted(_part(weight, part) for part in kept)
        bits += sum(8 * t.nbytes for t in kept.values())
        weights += out * width
    assert artifact.manifest.sizes.bits_per_weight == pytest.approx(bits / weights, abs=1e-6)
    layers = artifact.layers()
    assert {layer["scheme"] for layer in layers} == {scheme.label} == {artifact.scheme}
    total = sum(layer["bits_per_weight"] * before[f"{layer['name']}.weight"].numel() for layer in layers)
    assert total == pytest.approx(bits)
    (group,) = artifact.config["quantization_config"]["config_groups"].values()
    assert group["format"] == ("float-quantized" if isinstance(scheme, Fp8Scheme) else "int-quantized")


def _part(weight: str, part: str) -> str:
    return f"{weight.removesuffix('.weight')}.{part}"


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in EXPERTS])
@pytest.mark.parametrize(
    ("scheme", "method"), [("W8A8_STATIC", "gptq"), ("FP8_DYNAMIC", "rtn"), ("W8A8", "smoothquant")]
)
def test_every_dense_family(scheme: str, method: str, family: str, tiny: Callable[..., Path], make: Make) -> None:
    source = tiny(family)
    artifact = make(source, scheme, method)
    assert check_loads(source, artifact, ours_only=family in OURS_ONLY) > 0.001
    quantized = {name for name, entry in artifact.manifest.ledger.items() if entry.action == "quantized"}
    assert quantized == harness.block_matrices(harness.tensors(source))


@pytest.mark.parametrize("family", EXPERTS)
def test_fused_experts_are_refused_by_name_and_may_be_left_out(
    family: str, tiny: Callable[..., Path], make: Make
) -> None:
    source = tiny(family)
    with pytest.raises(UserError, match=r"experts\.0.*fused experts"):
        make(source, "FP8_DYNAMIC")
    artifact = make(source, "W8A8", ignore=["*.experts.*"])
    assert check_loads(source, artifact, ours_only=True) > 0.001


def test_engines_load_one_scale_for_what_they_fuse(tiny: Callable[..., Path], make: Make) -> None:
    stored = harness.tensors(make(tiny("llama", **WIDE), "FP8_STATIC").path)
    for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        for part in ("weight_scale", "input_scale"):
            assert len({float(stored[f"model.layers.1.{name}.{part}"]) for name in group}) == 1
    assert len({float(t) for name, t in stored.items() if name.endswith("weight_scale")}) == 8


@pytest.mark.parametrize(("scheme", "method"), CASES)
def test_the_plan_is_what_the_run_makes(
    scheme: str, method: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, wanted = tiny("llama", **WIDE), recipe(method, text, scheme=scheme)
    planned = pipeline.plan(wanted, model=source, output=tmp_path / "out")
    assert planned.problems == []
    assert planned.seconds_estimate > 0
    sizes = pipeline.run(wanted, model=source, output=tmp_path / "out").artifact.manifest.sizes
    assert planned.bits_per_weight == pytest.approx(sizes.bits_per_weight, rel=1e-6)
    assert planned.output_bytes == pytest.approx(sizes.bytes, rel=0.02)


@pytest.mark.parametrize(("scheme", "method"), [case for case in CASES if case[0].endswith("STATIC")])
def test_threads_change_no_byte_and_a_killed_run_goes_on(
    scheme: str,
    method: str,
    tiny: Callable[..., Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inputs, "CHUNK_TOKENS", 64)
    source, wanted = tiny("llama", **WIDE), recipe(method, text, scheme=scheme, samples=12)
    first = pipeline.run(wanted, model=source, output=tmp_path / "first").artifact
    torch.set_num_threads(3)
    with monkeypatch.context() as patched:
        patched.setattr(durable, "step", harness.failing_at("before write block-00001.safetensors"))
        with pytest.raises(WorkError, match="the disk is full"):
            pipeline.run(wanted, model=source, output=tmp_path / "second")
    result = pipeline.run(wanted, model=source, output=tmp_path / "second")
    assert (result.resumed_blocks, result.computed_blocks) == (1, 1)
    assert harness.tensor_hashes(result.artifact) == harness.tensor_hashes(first)
    assert result.artifact.artifact_id == first.artifact_id


def test_outliers_of_inputs_move_into_the_weights(
    tiny: Callable[..., Path], text: Path, make: Make, tmp_path: Path
) -> None:
    """A llama whose norms give a few channels thirty times the size, and whose linears take it back."""

    def enlarge(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name in tensors:
            if name.endswith("layernorm.weight"):
                tensors[name][:2] *= 100
            elif any(part in name for part in ("q_proj.w", "k_proj.w", "v_proj.w", "gate_proj.w", "up_proj.w")):
                tensors[name][:, :2] /= 100
        return tensors

    twin = harness.copy_with(tiny("llama", **WIDE), tmp_path / "twin", enlarge)
    plain, smooth = make(twin, "W8A8"), make(twin, "W8A8", "smoothquant")
    assert check_loads(twin, smooth) < 0.5 * check_loads(twin, plain)
    folded = {name for name, entry in smooth.manifest.ledger.items() if entry.action == "folded"}
    assert {name for name in folded if name.endswith("layernorm.weight")}
    scaled = [layer["details"] for layer in smooth.layers() if not layer["details"].get("identity", True)]
    assert scaled
    assert all(0 <= detail["alpha"] <= 1 and detail["loss_share"] < 1 for detail in scaled)


def test_smoothquant_may_hand_over_to_gptq(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source = tiny("llama", **WIDE)
    wanted = harness.with_options(recipe("smoothquant", text, scheme="W8A8"), rounding="gptq", least_gain=0.0)
    artifact = pipeline.run(wanted, model=source, output=tmp_path / "out").artifact
    assert check_loads(source, artifact) < 0.1
    details = {layer["name"]: layer["details"] for layer in artifact.layers()}
    assert all("damp_frac" in detail for detail in details.values())
    assert any(detail.get("identity") is False for detail in details.values())
    assert {layer["method"] for layer in artifact.layers()} == {"smoothquant"}


def test_a_fold_that_moves_the_float_block_is_undone(
    tiny: Callable[..., Path], make: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny("llama", **WIDE)
    monkeypatch.setattr(fold, "FOLD_TOLERANCE", -1.0)
    wanted = harness.with_options(recipe("smoothquant", text, scheme="W8A8"), least_gain=0.0)
    undone = pipeline.run(wanted, model=source, output=tmp_path / "undone").artifact
    assert {fallback.action for fallback in undone.manifest.fallbacks} == {"identity scale"}
    assert harness.tensor_hashes(undone) == harness.tensor_hashes(make(source, "W8A8"))


def test_inputs_that_are_not_read_are_refused(tiny: Callable[..., Path], make: Make) -> None:
    """Dequantised by transformers instead, such a checkpoint would score better than it is."""
    artifact = make(tiny("llama", **WIDE), "W8A8")
    config = harness.read_json(artifact.path / "config.json")
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"]["symmetric"] = False
    (artifact.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="rounds the inputs"):
        load(artifact.path, device="cpu")


@pytest.mark.parametrize("damage", ["missing", "zero", "infinite"])
def test_a_static_scale_must_be_a_number_to_divide_by(damage: str, tiny: Callable[..., Path], make: Make) -> None:
    artifact = make(tiny("llama", **WIDE), "W8A8_STATIC")
    stored, name = harness.tensors(artifact.path), "model.layers.0.mlp.up_proj.input_scale"
    change = {"zero": torch.zeros(1), "infinite": torch.full((1,), float("inf"))}
    stored = {key: t for key, t in {**stored, name: change.get(damage)}.items() if t is not None}
    save_file(stored, artifact.path / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError, match="input_scale is not one positive number"):
        load(artifact.path, device="cpu")


def test_tiles_that_do_not_divide_are_told_by_name(tiny: Callable[..., Path], tmp_path: Path) -> None:
    planned = pipeline.plan(recipe("rtn", scheme="FP8_BLOCK"), model=tiny("llama"), output=tmp_path / "out")
    assert any("the tile of FP8_BLOCK, 128, does not divide the width 96" in problem for problem in planned.problems)
    assert "FP8_DYNAMIC" in planned.hint


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("scheme", ["W8A8_STATIC", "FP8_STATIC"])
def test_a_dense_export_holds_the_rounded_weights(
    scheme: str, family: str, tiny: Callable[..., Path], make: Make, tmp_path: Path
) -> None:
    source = tiny(family)
    artifact = make(source, scheme)
    stored, expected = harness.tensors(export_dense(artifact.path, tmp_path / "dense").path), harness.decoded(artifact)
    assert set(stored) == set(expected) == set(harness.tensors(source))
    for name, tensor in stored.items():
        same = expected[name].T if family == "gpt2" and name in harness.block_matrices(stored) else expected[name]
        assert torch.equal(tensor, same), name

"""NVFP4, MXFP4 and MXFP8: the artifact is the fake-quantised model in transformers and in our own runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from compress import pipeline
from compress.artifact import durable
from compress.artifact.reader import Artifact
from compress.artifact.verify import verify
from compress.errors import IntegrityError, UserError, WorkError
from compress.exporters.dense import export_dense
from compress.pipeline import inputs
from compress.runtime.transformers_backend import load
from compress.schemes import FIXED_SCHEMES
from compress.types import BlockFloatScheme
from tests.pipeline import harness
from tests.pipeline.harness import recipe
from tests.tiny_models import tiny_tokens

SCHEMES = {name: scheme for name, scheme in FIXED_SCHEMES.items() if isinstance(scheme, BlockFloatScheme)}
CASES = [(name, "rtn") for name in SCHEMES]
CASES += [("NVFP4", "gptq"), ("NVFP4", "smoothquant"), ("NVFP4A16", "sweep"), ("MXFP4", "sweep"), ("MXFP8A16", "gptq")]
PARTS = {
    "NVFP4": {"weight_packed": torch.uint8, "weight_scale": torch.float8_e4m3fn, "weight_global_scale": torch.float32},
    "MXFP4": {"weight_packed": torch.uint8, "weight_scale": torch.uint8},
    "MXFP8": {"weight": torch.float8_e4m3fn, "weight_scale": torch.uint8},
}
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
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


def transformers_logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits in float32 as transformers itself loads the directory; no key may be missing or left over.

    Where inputs are rounded too, the package decodes weights into bfloat16 at the first forward, so that is what such
    models are loaded in.
    """
    if harness.read_json(path / "config.json")["quantization_config"].get("dequantize"):
        return harness.loaded_logits(path, tokens)
    model, info = AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, local_files_only=True, dtype=torch.bfloat16
    )
    assert not any(info.values()), info
    with torch.no_grad():  # not inference mode, whose weights could not be widened afterwards
        model.eval()(tokens)
    return harness.logits(torch.nn.Module.float(model), tokens)


def check_loads(source: Path, artifact: Artifact) -> float:
    """Compares with the oracle; returns how far the logits moved from the source's."""
    tokens = tiny_tokens(2, 12)
    expected = harness.fake_quantized_logits(source, artifact, tokens)
    assert torch.equal(load(artifact.path, device="cpu").score(tokens), expected)
    torch.testing.assert_close(transformers_logits(artifact.path, tokens), expected, rtol=1e-5, atol=1e-5)
    return harness.distance(expected, harness.source_logits(source, tokens))


@pytest.mark.parametrize(("name", "method"), CASES)
def test_it_is_the_fake_quantised_model(name: str, method: str, tiny: Callable[..., Path], make: Make) -> None:
    source = tiny("llama", dtype=torch.bfloat16, **WIDE)
    artifact = make(source, name, method)
    assert 0.001 < check_loads(source, artifact) < (0.3 if "FP8" in name else 1.2)
    assert verify(artifact.path).problems == []
    check_layout(source, artifact, name)


def check_layout(source: Path, artifact: Artifact, name: str) -> None:
    """Tensors, sizes, ledger and reports follow from the scheme."""
    scheme, before, after = SCHEMES[name], harness.tensors(source), harness.tensors(artifact.path)
    parts = PARTS[name.removesuffix("A16")] | ({"input_global_scale": torch.float32} if name == "NVFP4" else {})
    bits = weights = 0
    for weight in harness.block_matrices(before):
        linear = weight.removesuffix(".weight")
        kept = {n.removeprefix(f"{linear}."): t for n, t in after.items() if n.startswith(f"{linear}.")}
        kept.pop("bias", None)
        assert {part: t.dtype for part, t in kept.items()} == parts
        assert artifact.manifest.ledger[weight].action == "quantized"
        assert sorted(artifact.manifest.ledger[weight].into) == sorted(f"{linear}.{part}" for part in kept)
        bits += sum(8 * t.nbytes for t in kept.values())
        weights += before[weight].numel()
    assert artifact.manifest.sizes.bits_per_weight == pytest.approx(bits / weights, abs=1e-6)
    layers = artifact.layers()
    assert {layer["scheme"] for layer in layers} == {scheme.label} == {artifact.scheme}
    total = sum(layer["bits_per_weight"] * before[f"{layer['name']}.weight"].numel() for layer in layers)
    assert total == pytest.approx(bits)


@pytest.mark.parametrize(("family", "name"), [("qwen2", "NVFP4"), ("gemma2", "MXFP4A16"), ("phi3", "NVFP4A16")])
def test_other_families(family: str, name: str, tiny: Callable[..., Path], make: Make) -> None:
    source = tiny(family, dtype=torch.bfloat16)
    assert check_loads(source, make(source, name)) > 0.001


@pytest.mark.parametrize("name", ["NVFP4A16", "MXFP4A16", "MXFP8A16"])
@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_what_the_package_does_not_carry_is_for_our_reader(
    family: str, name: str, tiny: Callable[..., Path], make: Make, tmp_path: Path
) -> None:
    """Conv1D, and fused experts, which transformers would read without their scales."""
    source, tokens = tiny(family, dtype=torch.bfloat16), tiny_tokens(2, 12)
    artifact = make(source, name)
    expected = harness.fake_quantized_logits(source, artifact, tokens)
    assert torch.equal(load(artifact.path, device="cpu").score(tokens), expected)
    with pytest.raises(ValueError, match="quant_method"):
        AutoModelForCausalLM.from_pretrained(artifact.path)
    dense = export_dense(artifact.path, tmp_path / "dense").path
    assert {t.dtype for t in harness.tensors(dense).values()} == {torch.bfloat16}
    assert torch.equal(load(dense, device="cpu").score(tokens), expected)


def test_engines_load_one_divisor_for_what_they_fuse(tiny: Callable[..., Path], make: Make, tmp_path: Path) -> None:
    def enlarge(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: t * (9 if n.endswith(("k_proj.weight", "up_proj.weight")) else 1) for n, t in tensors.items()}

    source = harness.copy_with(tiny("llama", dtype=torch.bfloat16, **WIDE), tmp_path / "uneven", enlarge)
    for method in ("rtn", "sweep"):
        stored = harness.tensors(make(source, "NVFP4", method).path)
        for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            for part in ("weight_global_scale", "input_global_scale"):
                assert len({float(stored[f"model.layers.1.{name}.{part}"]) for name in group}) == 1
        assert len({float(t) for n, t in stored.items() if n.endswith("weight_global_scale")}) > 1


@pytest.mark.parametrize(("name", "method"), [("NVFP4", "rtn"), ("MXFP8", "rtn"), ("NVFP4A16", "sweep")])
def test_the_plan_is_what_the_run_makes(
    name: str, method: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, wanted = tiny("llama", dtype=torch.bfloat16, **WIDE), recipe(method, text, scheme=name)
    planned = pipeline.plan(wanted, model=source, output=tmp_path / "out")
    assert planned.problems == []
    assert planned.seconds_estimate > 0
    sizes = pipeline.run(wanted, model=source, output=tmp_path / "out").artifact.manifest.sizes
    assert planned.bits_per_weight == pytest.approx(sizes.bits_per_weight, rel=1e-6)
    assert planned.output_bytes == pytest.approx(sizes.bytes, rel=0.1)  # the header weighs much in a tiny file


@pytest.mark.parametrize(("name", "method"), [("NVFP4", "gptq"), ("MXFP4", "sweep")])
def test_threads_change_no_byte_and_a_killed_run_goes_on(
    name: str, method: str, tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "CHUNK_TOKENS", 64)
    source = tiny("llama", dtype=torch.bfloat16, **WIDE)
    wanted = recipe(method, text, scheme=name, samples=12)
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


@pytest.mark.parametrize("damage", ["missing", "zero"])
def test_what_is_stored_of_inputs_must_be_a_number(damage: str, tiny: Callable[..., Path], make: Make) -> None:
    artifact = make(tiny("llama", dtype=torch.bfloat16, **WIDE), "NVFP4")
    stored, name = harness.tensors(artifact.path), "model.layers.0.mlp.up_proj.input_global_scale"
    stored = {key: t for key, t in stored.items() if key != name}
    if damage == "zero":
        stored[name] = torch.zeros(1)
    save_file(stored, artifact.path / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError, match="input_global_scale is not one positive number"):
        load(artifact.path, device="cpu")


def test_bad_requests_are_told_by_name(tiny: Callable[..., Path], make: Make, tmp_path: Path) -> None:
    planned = pipeline.plan(
        recipe("rtn", scheme="MXFP8"),
        model=tiny("llama", hidden_size=80, num_attention_heads=4, num_key_value_heads=2),
        output=tmp_path / "out",
    )
    assert any("the tile of MXFP8, 32, does not divide the width 80" in problem for problem in planned.problems)
    with pytest.raises(UserError, match=r"experts\.0.*fused experts"):
        make(tiny("mixtral"), "MXFP4")

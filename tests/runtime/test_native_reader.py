"""Packed checkpoints of every family load as the model they stand for; damage and contradictions are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from compress.errors import IntegrityError, UserError
from compress.formats.compressed_tensors import for_own_reader
from compress.models.skeleton import LinearSpec
from compress.runtime.native_reader import load_dense_state, reads
from compress.runtime.transformers_backend import load
from compress.types import IntScheme
from tests.runtime.packed import fitting, write_packed
from tests.tiny_models import FAMILIES, tiny_tokens


def dense_logits(path: Path) -> Tensor:
    """Logits of transformers' own plain loading."""
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(tiny_tokens(2, 20)).logits


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_packed_equals_fake_quantised(
    model_type: str, symmetric: bool, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny(model_type)
    packed, dense = write_packed(source, tmp_path, fitting(4, 32, symmetric))
    runtime = load(packed, device="cpu")
    logits = runtime.score(tiny_tokens(2, 20))
    assert torch.equal(logits, dense_logits(dense))
    assert not torch.allclose(logits, dense_logits(source), atol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_every_width(bits: int, tiny: Callable[..., Path], tmp_path: Path) -> None:
    packed, dense = write_packed(tiny("llama"), tmp_path, fitting(bits))
    assert torch.equal(load(packed, device="cpu").score(tiny_tokens(2, 20)), dense_logits(dense))


def test_several_schemes_in_one_model(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """transformers decodes every layer by the first scheme; here each linear has its own."""

    def choose(spec: LinearSpec) -> IntScheme | None:
        if spec.name.endswith("o_proj"):
            return None
        return IntScheme(8, None) if spec.name.endswith("down_proj") else IntScheme(3, 32, symmetric=False)

    packed, dense = write_packed(tiny("llama"), tmp_path, choose)
    assert torch.equal(load(packed, device="cpu").score(tiny_tokens(2, 20)), dense_logits(dense))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_bfloat16_weights_are_what_transformers_decodes(
    model_type: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    packed, _ = write_packed(tiny(model_type, dtype=torch.bfloat16), tmp_path, lambda spec: IntScheme(4, 32))
    theirs = AutoModelForCausalLM.from_pretrained(
        packed, dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    ours = load(packed, device="cpu", dtype="bfloat16").model
    expected = theirs.state_dict()
    assert set(ours.state_dict()) == set(expected)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_float32_compute_keeps_the_stored_rounding(tiny: Callable[..., Path], tmp_path: Path) -> None:
    packed, _ = write_packed(tiny("llama", dtype=torch.bfloat16), tmp_path, fitting(4))
    weights = [p for name, p in load(packed, device="cpu").model.named_parameters() if name.endswith("q_proj.weight")]
    assert weights
    for weight in weights:
        assert weight.dtype == torch.float32
        assert torch.equal(weight, weight.bfloat16().float())


def test_dense_state_has_the_dense_names(tiny: Callable[..., Path], tmp_path: Path) -> None:
    packed, dense = write_packed(tiny("qwen3_moe"), tmp_path, fitting(4))
    state, expected = load_dense_state(packed), load_file(dense / "model.safetensors")
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def damage(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrites the weights of a checkpoint."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def reconfigure(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Rewrites the quantization_config of a checkpoint."""
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("weight_scale", lambda t: t.pop(f"{Q_PROJ}.weight_scale")),
        ("weight_shape", lambda t: t.pop(f"{Q_PROJ}.weight_shape")),
        (Q_PROJ, lambda t: t.update({f"{Q_PROJ}.weight_packed": t[f"{Q_PROJ}.weight_packed"][:, :-1].contiguous()})),
        (Q_PROJ, lambda t: t.update({f"{Q_PROJ}.weight": torch.zeros(96, 96)})),
        ("missing keys", lambda t: [t.pop(n) for n in list(t) if n.startswith(f"{Q_PROJ}.weight")]),
        ("unexpected keys", lambda t: t.update({"model.layers.9.extra.weight": torch.zeros(3)})),
        ("mismatched keys", lambda t: t.update({"model.norm.weight": torch.zeros(3)})),
    ],
)
def test_damaged_tensors_are_refused(
    what: str, change: Callable[[dict[str, Tensor]], object], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    packed, _ = write_packed(tiny("llama"), tmp_path, fitting(4))
    damage(packed, change)
    with pytest.raises(IntegrityError) as caught:
        load(packed, device="cpu")
    assert what in caught.value.message


def test_a_config_that_contradicts_the_tensors_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    packed, _ = write_packed(tiny("llama"), tmp_path, fitting(4))
    reconfigure(packed, lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=3))  # type: ignore[index]
    with pytest.raises(IntegrityError, match="weight_packed"):
        load(packed, device="cpu")


def test_a_packed_linear_without_a_group_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    packed, _ = write_packed(tiny("llama"), tmp_path, fitting(4))
    reconfigure(packed, lambda q: q.update(ignore=[Q_PROJ]))
    with pytest.raises(IntegrityError, match="no group"):
        load(packed, device="cpu")


def test_what_it_reads() -> None:
    group = {"weights": {"type": "int", "strategy": "group", "num_bits": 4, "group_size": 32, "symmetric": True}}
    packed = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    assert reads({"quantization_config": packed})
    assert reads({"quantization_config": for_own_reader(packed)})
    activations = {**group, "input_activations": {"num_bits": 8}}
    floats = {"weights": {"type": "float", "strategy": "channel", "num_bits": 8}}
    for other in (activations, floats):
        assert not reads({"quantization_config": {**packed, "config_groups": {"group_0": group, "group_1": other}}})
    assert not reads({"quantization_config": {"quant_method": "awq"}})
    assert not reads({})


def test_other_quantisations_are_refused_by_name(tiny: Callable[..., Path], tmp_path: Path) -> None:
    packed, _ = write_packed(tiny("llama"), tmp_path, fitting(4))
    reconfigure(packed, lambda q: q.update(quant_method="awq"))
    with pytest.raises(UserError, match="awq"):
        load(packed, device="cpu")

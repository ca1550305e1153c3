"""The outlier twin is the same function with outlier channels: same logits, harder to round."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_twin = _module(ROOT / "benchmarks" / "outlier_twin.py").make_twin


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A two-block Llama with random norms, tied embedding, odd sizes, in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=40,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@torch.no_grad()
def _logits(model_dir: Path, ids: torch.Tensor) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()(ids).logits


def test_twin_is_the_same_function(tiny: Path, tmp_path: Path) -> None:
    chosen = make_twin(tiny, tmp_path / "twin", channels=0.05, factor=30, seed=3)
    ids = torch.randint(0, 97, (2, 33), generator=torch.Generator().manual_seed(1))
    plain, twin = _logits(tiny, ids), _logits(tmp_path / "twin", ids)
    assert (plain - twin).abs().max() < 1e-4
    assert {len(channels) for channels in chosen.values()} == {2}
    assert len(chosen) == 4


def test_only_the_named_channels_change(tiny: Path, tmp_path: Path) -> None:
    chosen = make_twin(tiny, tmp_path / "twin", channels=0.05, factor=30, seed=3)
    before = {name: t.float() for name, t in load_file(tiny / "model.safetensors").items()}
    after = load_file(tmp_path / "twin" / "model.safetensors")
    assert before.keys() == after.keys()
    assert {t.dtype for t in after.values()} == {torch.float32}
    assert json.loads((tmp_path / "twin" / "config.json").read_text())["dtype"] == "float32"
    for name, tensor in after.items():
        factor = tensor / before[name]
        norm = name.removesuffix(".weight")
        reader = next((n for n in chosen if name.startswith(n.rpartition(".")[0]) and _reads(name, n)), None)
        if norm in chosen:
            expected = torch.ones(40)
            expected[chosen[norm]] = 30.0
        elif reader is not None:
            expected = torch.ones(40)
            expected[chosen[reader]] = 1 / 30
        else:
            expected = torch.ones(1)
        torch.testing.assert_close(factor, expected.expand_as(factor), rtol=1e-6, atol=0)


def _reads(linear: str, norm: str) -> bool:
    readers = ("q_proj", "k_proj", "v_proj") if norm.endswith("input_layernorm") else ("gate_proj", "up_proj")
    return linear.split(".")[-2] in readers


def test_seed_decides_the_channels(tiny: Path, tmp_path: Path) -> None:
    first = make_twin(tiny, tmp_path / "a", seed=0)
    assert make_twin(tiny, tmp_path / "b", seed=0) == first
    assert make_twin(tiny, tmp_path / "c", seed=1) != first
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_rounding_hurts_the_twin_more(shared: Path, tmp_path: Path) -> None:
    """On the trained model: 4-bit round-to-nearest of every linear moves the twin's logits further."""
    source = shared / "models" / "tales-6m"
    make_twin(source, tmp_path / "twin")
    ids = torch.randint(4, 4096, (1, 128), generator=torch.Generator().manual_seed(0))
    reference = _logits(source, ids)
    assert (reference - _logits(tmp_path / "twin", ids)).abs().max() < 1e-4
    errors = [(_rounded_logits(path, ids) - reference).square().mean() for path in (source, tmp_path / "twin")]
    assert errors[1] > 1.3 * errors[0]


@torch.no_grad()
def _rounded_logits(model_dir: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            groups = module.weight.unflatten(1, (-1, 128))
            scale = groups.abs().amax(-1, keepdim=True) / 7.5
            module.weight.copy_(((groups / scale).round().clamp(-8, 7) * scale).flatten(1))
    return model(ids).logits


def test_refuses_what_it_does_not_know(tiny: Path, tmp_path: Path) -> None:
    make_twin(tiny, tmp_path / "twin")
    with pytest.raises(FileExistsError):
        make_twin(tiny, tmp_path / "twin")
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(ValueError, match="gpt2"):
        make_twin(tiny, tmp_path / "other")
    assert not (tmp_path / "other").exists()

"""Small key-value caches against the same rounding in torch, calibrated scales, skipped layers, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import compress
from compress.errors import UserError
from compress.models import kv_cache as attentions_of
from compress.runtime import loading, transformers_backend
from compress.runtime.cache_choice import COLLAPSED
from compress.runtime.native_backend import NativeRuntime
from compress.runtime.protocol import SamplingParams
from tests.runtime.native import divergence
from tests.runtime.packed import fitting, write_packed
from tests.tiny_models import tiny_tokens

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def native(path: Path, kv_cache: str = "auto", kv_skip: str = "none") -> NativeRuntime:
    runtime = loading.load(path, device="cpu", kernel="cpu", kv_cache=kv_cache, kv_skip=kv_skip)
    assert isinstance(runtime, NativeRuntime)
    return runtime


def eight(x: Tensor, scale: float = 1.0) -> Tensor:
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def up_to_bfloat16(x: Tensor) -> Tensor:
    near = x.bfloat16().float()
    above = (near.bfloat16().view(torch.int16) + 1).view(torch.bfloat16).float()
    return torch.where(near < x, above, near)


def four(x: Tensor) -> Tensor:
    """x (..., dim) as NVFP4 with one more scale per token and head."""
    blocks = x.unflatten(-1, (-1, 16))
    token = up_to_bfloat16(x.abs().amax(-1) / (6 * 448))[..., None, None]
    scale = eight(blocks.abs().amax(-1, keepdim=True) / token / 6) * token
    sizes = (blocks / scale).abs().nan_to_num()
    nearest = FP4[(sizes.unsqueeze(-1) - FP4).abs().argmin(-1)]
    return (nearest * blocks.sign() * scale).flatten(-2)


@pytest.mark.parametrize(("kind", "rounded"), [("fp8", eight), ("nvfp4", four)])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "packaged"])
def test_caches_hold_what_torch_rounds_to(
    kind: str, rounded: Callable[[Tensor], Tensor], model_type: str, tiny: Callable[..., Path], packaged_model: Path
) -> None:
    path = packaged_model if model_type == "packaged" else tiny(model_type, head_dim=32)
    reference = transformers_backend.load(path, device="cpu")
    for attention in attentions_of.attentions(reference.model).values():
        attentions_of.tap(attention, lambda key, value: (rounded(key), rounded(value)))
    runtime, tokens = native(path, kind), tiny_tokens(2, 60)
    found, expected = runtime.score(tokens), reference.score(tokens)
    lost = divergence(expected, native(path).score(tokens))
    assert divergence(found, expected) < 0.02 * lost  # a number that lies between two codes may go either way


def calibrated(source: Path, target: Path, scales: list[tuple[float, float]]) -> Path:
    """A copy in 4 bits that says and stores the scales of an FP8 cache."""
    packed, _ = write_packed(source, target, fitting(4, 32))
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor",
        "dynamic": False,
    }
    (packed / "config.json").write_text(json.dumps(config))
    tensors = load_file(packed / "model.safetensors")
    for i, pair in enumerate(scales):
        for part, scale in zip(("k_scale", "v_scale"), pair, strict=True):
            tensors[f"model.layers.{i}.self_attn.{part}"] = torch.tensor([scale])
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    return packed


def test_stored_scales_are_used(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path, tokens = calibrated(tiny("llama"), tmp_path, [(0.02, 0.01), (0.03, 0.015)]), tiny_tokens(2, 40)
    runtime, reference = native(path), transformers_backend.load(path, device="cpu")
    assert (runtime.cache.kind, runtime.cache.kl) == ("fp8", None)
    exact = native(path, "float32").score(tokens)
    lost = divergence(reference.score(tokens), exact)
    assert lost > 1e-7
    assert divergence(runtime.score(tokens), reference.score(tokens)) < 0.02 * lost


def large_values(source: Path, target: Path) -> Path:
    """The same model with values of layer 1 beyond what FP8 holds, which its output projection undoes."""
    path = Path(shutil.copytree(source, target))
    tensors = load_file(path / "model.safetensors")
    for part, factor in (("v_proj.weight", 4096.0), ("v_proj.bias", 4096.0), ("o_proj.weight", 1 / 4096)):
        tensors[f"model.layers.1.self_attn.{part}"] *= factor
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def test_fp8_without_scales_is_refused_where_it_breaks_the_model(tiny: Callable[..., Path], tmp_path: Path) -> None:
    runtime = native(tiny("qwen2"), "fp8")
    assert runtime.cache.kl is not None
    assert 0 < runtime.cache.kl <= COLLAPSED
    broken = large_values(tiny("qwen2"), tmp_path / "large")
    with pytest.raises(UserError, match="without calibrated scales breaks this model"):
        native(broken, "fp8")
    assert native(broken, "fp8", kv_skip="1").cache.skipped == (1,)


def test_layers_are_skipped_by_what_they_lose(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = large_values(tiny("qwen2"), tmp_path / "large")
    every, some = native(tiny("qwen2"), "fp8"), native(path, "fp8", kv_skip="auto")
    choice = some.cache
    assert choice.skipped == (1,)
    assert choice.kl is not None
    assert choice.kl_of_all is not None
    assert choice.kl < COLLAPSED < choice.kl_of_all
    assert every.model.cache_bytes < some.model.cache_bytes < native(path, "bfloat16").model.cache_bytes
    tokens = tiny_tokens(2, 40)
    assert torch.equal(some.score(tokens), native(path, "fp8", kv_skip="1").score(tokens))


@pytest.mark.parametrize(
    ("kind", "skip", "said"),
    [
        ("int3", "none", "not known"),
        ("int4", "2", "not there"),
        ("int4", "some", "not there"),
        ("auto", "0", "nothing to skip"),
    ],
)
def test_what_cannot_be_is_refused(kind: str, skip: str, said: str, tiny: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=said):
        native(tiny("qwen2"), kind, skip)


def test_heads_that_nvfp4_cannot_hold(tiny: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="no place for heads of 24"):
        native(tiny("llama", head_dim=24), "nvfp4")


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_answers_do_not_depend_on_company(kind: str, packaged_model: Path) -> None:
    llm = compress.LLM(packaged_model, kv_cache=kind, kv_skip="0")
    prompts, params = ["The king", "Once upon a time there was", "A"], SamplingParams(max_tokens=24, logprobs=1)
    together = llm.generate(prompts, params)
    for prompt, answer in zip(prompts, together, strict=True):
        (alone,) = llm.generate(prompt, params)
        assert (alone.token_ids, alone.logprobs) == (answer.token_ids, answer.logprobs)

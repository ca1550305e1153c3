"""Streaming block by block gives the logits that transformers gives for the whole model."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from compress.models import streamed_head
from compress.models.experts import Expert
from tests.models.streaming import open_skeleton, oracle_logits, streamed_logits
from tests.tiny_models import FAMILIES, VOCABULARY, tiny_tokens

VARIANTS = {
    "llama without grouping": ("llama", {"num_key_value_heads": 6}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False}),
    "gpt_neox untied": ("gpt_neox", {"tie_word_embeddings": False}),
    "gpt_neox sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "opt norm after": ("opt", {"do_layer_norm_before": False}),
    "opt plain norms": ("opt", {"layer_norm_elementwise_affine": False, "enable_bias": False}),
    "deepseek_v3 dense query": ("deepseek_v3", {"q_lora_rank": None}),
    "mixtral recording routers": ("mixtral", {"output_router_logits": True}),
    "more blocks": ("gemma3_text", {"num_hidden_layers": 3, "layer_types": ["sliding_attention"] * 3}),
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_float32_logits_equal_transformers(model_type: str, tiny: Callable[..., Path]) -> None:
    path, tokens = tiny(model_type), tiny_tokens(2, 19)
    expected = oracle_logits(path, tokens)
    logits = streamed_logits(open_skeleton(path), tokens)
    assert logits.shape == (2, 19, VOCABULARY)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_bfloat16_logits_are_as_good_as_transformers(model_type: str, tiny: Callable[..., Path]) -> None:
    path, tokens = tiny(model_type), tiny_tokens(1, 11)
    exact = oracle_logits(path, tokens)
    peer = oracle_logits(path, tokens, torch.bfloat16)
    logits = streamed_logits(open_skeleton(path, torch.bfloat16), tokens)
    assert (logits - exact).norm() <= 1.1 * (peer - exact).norm() + 1e-3 * exact.norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_transformers(variant: str, tiny: Callable[..., Path]) -> None:
    model_type, overrides = VARIANTS[variant]
    path, tokens = tiny(model_type, **overrides), tiny_tokens(2, 13)
    torch.testing.assert_close(
        streamed_logits(open_skeleton(path), tokens), oracle_logits(path, tokens), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("model", ["tales-6m", "stories260K"])
def test_real_models_equal_transformers(model: str, shared: Path) -> None:
    path = shared / "models" / model
    tokens = tiny_tokens(2, 40)
    torch.testing.assert_close(
        streamed_logits(open_skeleton(path), tokens), oracle_logits(path, tokens), rtol=1e-5, atol=1e-4
    )


def test_a_config_of_an_older_transformers_keeps_its_rope(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = shutil.copytree(tiny("llama"), tmp_path / "old")
    config = json.loads((path / "config.json").read_text())
    del config["rope_parameters"]
    config["rope_theta"] = 300.0
    config["rope_scaling"] = {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    (path / "config.json").write_text(json.dumps(config))
    tokens = tiny_tokens(1, 19)
    logits = streamed_logits(open_skeleton(path), tokens)
    torch.testing.assert_close(logits, oracle_logits(path, tokens), rtol=1e-5, atol=1e-5)
    assert (logits - oracle_logits(tiny("llama"), tokens)).abs().max() > 1e-2


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "qwen2"])
def test_blocks_get_the_arguments_of_their_own_layer_type(model_type: str, tiny: Callable[..., Path]) -> None:
    skeleton = open_skeleton(tiny(model_type))
    hidden, calls = skeleton.embed(tiny_tokens(1, 19))
    module = skeleton.materialise(0)
    own, other = (skeleton.run_block(module, hidden, call) for call in calls)
    # the window is 5 tokens, so the layer types agree at first and must differ later
    torch.testing.assert_close(own[:, 0], other[:, 0], rtol=1e-5, atol=1e-5)
    assert (own[:, -1] - other[:, -1]).abs().max() > 1e-3


def test_experts_without_tokens_are_not_called(tiny: Callable[..., Path]) -> None:
    path, tokens = tiny("mixtral"), tiny_tokens(1, 2)
    skeleton = open_skeleton(path)
    hidden, calls = skeleton.embed(tokens)
    module = skeleton.materialise(0)
    experts = [child for child in module.modules() if isinstance(child, Expert)]
    seen: list[tuple[int, int]] = []
    for number, expert in enumerate(experts):
        expert.register_forward_hook(lambda _, args, __, number=number: seen.append((number, args[0].shape[0])))
    skeleton.run_block(module, hidden, calls[0])
    assert len(experts) == 8
    assert sum(count for _, count in seen) == 4  # two tokens, two experts each
    assert 2 <= len(seen) <= 4
    torch.testing.assert_close(streamed_logits(skeleton, tokens), oracle_logits(path, tokens), rtol=1e-5, atol=1e-5)


def test_the_head_is_the_same_in_any_number_of_slices(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = open_skeleton(tiny("gemma2"))
    hidden = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(0))
    whole = skeleton.head(hidden)
    monkeypatch.setattr(streamed_head, "_SLICE_BYTES", 96 * 4 * 10)
    torch.testing.assert_close(skeleton.head(hidden), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_two_copies_of_a_block_are_independent(model_type: str, tiny: Callable[..., Path]) -> None:
    skeleton = open_skeleton(tiny(model_type))
    hidden, calls = skeleton.embed(tiny_tokens(1, 7))
    first, second = skeleton.materialise(1), skeleton.materialise(1)
    before = skeleton.run_block(second, hidden, calls[1])
    for tensor in first.state_dict().values():
        tensor.zero_()
    assert torch.equal(skeleton.run_block(second, hidden, calls[1]), before)
    assert torch.equal(skeleton.run_block(skeleton.materialise(1), hidden, calls[1]), before)
    assert not second.training
    assert not any(parameter.requires_grad for parameter in second.parameters())


def test_tensors_that_the_architecture_keeps_in_float32_stay_so(tiny: Callable[..., Path]) -> None:
    skeleton = open_skeleton(tiny("deepseek_v3"), torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in skeleton.materialise(1).state_dict().items()}
    assert dtypes.pop("mlp.gate.e_score_correction_bias") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_no_more_than_one_block_is_resident(tiny: Callable[..., Path]) -> None:
    skeleton = open_skeleton(tiny("llama", num_hidden_layers=6, hidden_size=192, intermediate_size=640))
    block_bytes = sum(skeleton.checkpoint.index[name].nbytes for name in skeleton.block_tensors(0))
    gc.collect()
    others = {id(tensor) for tensor in _live_tensors()}
    hidden, calls = skeleton.embed(tiny_tokens(1, 4))
    peaks, kept = [], []
    for block in range(skeleton.num_blocks):
        module = skeleton.materialise(block)
        hidden = skeleton.run_block(module, hidden, calls[block])
        peaks.append(sum(t.untyped_storage().nbytes() for t in _live_tensors() if id(t) not in others))
        skeleton.release(module)
        kept.append(module)  # release frees the memory although the module is still referred to
    assert block_bytes <= min(peaks)
    assert max(peaks) < 1.1 * block_bytes
    assert all(isinstance(module, nn.Module) for module in kept)


def _live_tensors() -> list[torch.Tensor]:
    tensors = [item for item in gc.get_objects() if type(item) in (torch.Tensor, nn.Parameter)]
    return list({tensor.data_ptr(): tensor for tensor in tensors if tensor.device.type == "cpu"}.values())

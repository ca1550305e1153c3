"""Caches of keys and values in fewer bits, in the native back end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import UserError
from compress.runtime import loading
from compress.runtime.native_backend import NativeRuntime
from tests.runtime.native import GREEDY, divergence, native, windows
from tests.tiny_models import tiny_tokens


@pytest.mark.parametrize(
    ("kv_cache", "most"),
    [("bfloat16", 2e-5), ("fp8", 2e-3), ("int8", 2e-4), ("nvfp4", 8e-2), ("int4", 5e-2), ("int2", 0.5)],
)
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_smaller_caches_are_close_and_as_small_as_said(
    kv_cache: str, most: float, model_type: str, packaged_model: Path, tiny: Callable[..., Path]
) -> None:
    path = packaged_model if model_type == "llama" else tiny(model_type)
    exact, small = native(path), loading.load(path, kernel="cpu", kv_cache=kv_cache)
    assert isinstance(small, NativeRuntime)
    rows = windows(exact) if model_type == "llama" else tiny_tokens(2, 60)
    found = divergence(small.score(rows), exact.score(rows))
    assert 0 < found < most
    shape = small.model.shape
    grid = 32 / shape.head_dim
    channels = 3 / 2 + (-(-shape.head_dim // 16) + -(-shape.head_dim // 32)) * grid / 2
    bits = {"bfloat16": 16, "fp8": 8, "int8": 8 + grid, "nvfp4": 4.5 + grid / 2, "int4": 4 + grid, "int2": channels}[
        kv_cache
    ]
    assert small.model.cache_bytes == shape.layers * 2 * shape.kv_heads * shape.head_dim * bits / 8
    prompts = rows[:, :20].tolist()
    alone = [small.generate([prompt], GREEDY)[0] for prompt in prompts]
    assert [answer.token_ids for answer in small.generate(prompts, GREEDY)] == [answer.token_ids for answer in alone]


@pytest.mark.parametrize("kv_cache", ["int8", "int4"])
def test_grids_cover_what_they_keep(kv_cache: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Keys and values far from zero, and constant ones, survive: a bias moves all of them."""
    path = Path(shutil.copytree(tiny("qwen2"), tmp_path / "model"))
    tensors = load_file(path / "model.safetensors")
    for name in list(tensors):
        if name.endswith(("k_proj.bias", "v_proj.bias")):
            tensors[name] = tensors[name] + 30.0
        if name.endswith("layers.0.self_attn.v_proj.weight"):
            tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    exact, small = native(path), loading.load(path, kernel="cpu", kv_cache=kv_cache)
    tokens = tiny_tokens(2, 50)
    assert divergence(small.score(tokens), exact.score(tokens)) < 1e-2


def test_a_cache_that_cannot_be_is_refused(tiny: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="not known"):
        loading.load(tiny("llama"), kv_cache="int3")
    for kernel, model_type in (("reference", "llama"), ("auto", "gpt2")):
        with pytest.raises(UserError, match="needs the engine"):
            loading.load(tiny(model_type), kernel=kernel, kv_cache="int8")

"""Configs with numbers that no model has: told at once, whatever they would make of memory and time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.errors import CompressError, UserError
from compress.runtime import loading

NAN = float("nan")


def changed(model: Path, work: Path, changes: dict[str, Any]) -> Path:
    """A copy of a model whose config.json has other values; `a.b` is `b` in `a`."""
    copy = Path(shutil.copytree(model, work / "model"))
    config = json.loads((copy / "config.json").read_text())
    for place, value in changes.items():
        *inside, key = place.split(".")
        found = config
        for name in inside:
            found = found[name]
        found[key] = value
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("model_type", "name", "value"),
    [
        ("gemma2", "query_pre_attn_scalar", 0),
        ("gemma2", "query_pre_attn_scalar", -1),
        ("gemma2", "attn_logit_softcapping", NAN),
        ("gemma2", "final_logit_softcapping", -1.0),
        ("gemma2", "sliding_window", -1),
        ("gemma2", "rms_norm_eps", NAN),
        ("qwen3_moe", "decoder_sparse_step", 0),
        ("qwen3_moe", "num_experts_per_tok", -1),
        ("qwen3_moe", "num_experts_per_tok", 2**40),
        ("qwen3_moe", "num_local_experts", 1_000_000),
        ("mixtral", "num_local_experts", 2**40),
        ("llama", "num_hidden_layers", 1_000_000),
        ("qwen3", "num_hidden_layers", 2**31),
        ("gpt2", "n_layer", 2**31),
    ],
)
def test_numbers_out_of_range_are_named(
    model_type: str, name: str, value: float, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"config.json has \w+ = "):
        loading.load(changed(tiny(model_type), tmp_path, {name: value}), device="cpu")


@pytest.mark.parametrize(
    ("model_type", "place", "value"),
    [
        ("llama", "rope_parameters.rope_theta", "x"),
        ("llama", "rope_parameters.rope_theta", None),
        ("llama", "rope_parameters.rope_theta", NAN),
        ("llama", "rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": "x"}),
        ("llama", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": "x"}),
        ("gemma3_text", "rope_parameters.full_attention.rope_theta", "x"),
        (
            "phi3",
            "rope_parameters",
            {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1], "long_factor": "x"},
        ),
    ],
)
def test_rotations_that_cannot_be_computed_are_told(
    model_type: str, place: str, value: Any, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(CompressError):
        loading.load(changed(tiny(model_type), tmp_path, {place: value}), device="cpu")


def test_more_experts_than_tensors_are_not_looked_for(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """A vocabulary is long enough for so many, so that the number alone does not give it away."""
    with pytest.raises(CompressError):
        loading.load(changed(tiny("qwen3_moe"), tmp_path, {"num_local_experts": 48}), device="cpu")

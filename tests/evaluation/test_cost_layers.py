"""Layers: nothing that multiplies is left out, and decoded weights are found out by their bytes or by the memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from compress.evaluation.costs.layers import MEMORY_SLACK, expected_bytes, fallback_reason, layer_costs
from compress.evaluation.costs.record import LayerCost
from compress.evaluation.costs.sizes import stored_modules
from compress.models.checkpoint import Checkpoint
from compress.runtime.protocol import LayerUse
from compress.runtime.transformers_backend import load
from tests.tiny_models import EXPERTS, FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_every_family_finds_its_files(family: str, tmp_path: Path) -> None:
    runtime = load(tiny_model(family, tmp_path / family), device="cpu")
    checkpoint = Checkpoint.open(runtime.path)
    layers = layer_costs(checkpoint, runtime.layers())
    corrected = family == "deepseek_v3"  # its routers have a buffer, one number per expert, that is no weight
    for layer in layers:  # stored and held in float32: the same bytes
        buffer = 4 * EXPERTS * (corrected and layer.tensor_class == "router")
        assert layer.stored_bytes == layer.held_bytes + buffer == 4 * layer.weights + buffer, layer
        assert (layer.packed, layer.dense_fallback) == (False, False)
    linear = {"attention", "mlp", "experts", "router", "other"}
    stored = [module for module in stored_modules(checkpoint).values() if module.tensor_class in linear]
    found = sum(layer.stored_bytes or 0 for layer in layers if layer.tensor_class != "head")
    assert found == sum(module.bytes for module in stored)
    assert [layer.tensor_class for layer in layers].count("head") == 1


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_a_token_reads_only_the_experts_it_is_sent_to(family: str, tmp_path: Path) -> None:
    runtime = load(tiny_model(family, tmp_path / family), device="cpu")
    layers = layer_costs(Checkpoint.open(runtime.path), runtime.layers())
    experts = [layer for layer in layers if layer.name.endswith(".experts")]
    assert experts
    for layer in layers:
        share = 2 / EXPERTS if layer in experts else 1
        assert layer.read_bytes == share * layer.held_bytes


def test_a_packed_artifact_in_dense_arithmetic_is_marked(artifact: Path) -> None:
    runtime = load(artifact, device="cpu")
    checkpoint = Checkpoint.open(artifact)
    layers = layer_costs(checkpoint, runtime.layers())
    fallen = [layer for layer in layers if layer.dense_fallback]
    assert [layer.name for layer in fallen] == [layer.name for layer in layers if layer.packed]
    assert len(fallen) == 14
    reason = fallback_reason(layers, None, *expected_bytes(checkpoint, 4))
    assert reason is not None
    assert "14 packed layers" in reason
    assert "dense" in reason


def packed_uses(checkpoint: Checkpoint) -> list[LayerUse]:
    """What a runtime says that multiplies the packed weights as they are stored."""
    return [
        LayerUse(name, (), "gemv", module.weights, module.bytes + module.scale_bytes, module.bytes + module.scale_bytes)
        for name, module in stored_modules(checkpoint).items()
        if module.packed
    ]


def test_packed_arithmetic_is_not_marked_and_decoding_on_the_fly_is(artifact: Path) -> None:
    checkpoint = Checkpoint.open(artifact)
    uses = packed_uses(checkpoint)
    layers = layer_costs(checkpoint, uses)
    assert all(layer.packed and not layer.dense_fallback for layer in layers)
    assert fallback_reason(layers, None, *expected_bytes(checkpoint, 4)) is None
    again = [replace(use, read_bytes=use.read_bytes + 4 * use.weights) for use in uses]  # held packed, decoded per call
    assert all(layer.dense_fallback for layer in layer_costs(checkpoint, again))


def layers_of(checkpoint: Checkpoint) -> Sequence[LayerCost]:
    return layer_costs(checkpoint, packed_uses(checkpoint))


def test_memory_gives_away_a_runtime_that_keeps_dense_weights(artifact: Path) -> None:
    layers = layers_of(Checkpoint.open(artifact))
    packed, decoded = 500_000_000, 4_000_000_000
    assert fallback_reason(layers, packed + MEMORY_SLACK, packed, decoded) is None
    assert fallback_reason(layers, None, packed, decoded) is None
    reason = fallback_reason(layers, decoded, packed, decoded)
    assert reason is not None
    assert str(decoded) in reason


def test_memory_does_not_judge_what_is_too_small_to_tell(artifact: Path) -> None:
    layers = layers_of(Checkpoint.open(artifact))
    assert fallback_reason(layers, 900_000_000, 1_000_000, 1_000_000 + MEMORY_SLACK) is None


def test_expected_bytes_by_hand(artifact: Path, tiny: Path) -> None:
    dense, packed = Checkpoint.open(tiny), Checkpoint.open(artifact)
    assert expected_bytes(dense, 4) == (dense.nbytes, dense.nbytes)
    kept, decoded = expected_bytes(packed, 4)
    assert (kept, decoded) == (packed.nbytes, dense.nbytes)
    assert expected_bytes(packed, 2)[1] == dense.nbytes // 2


def test_a_layer_without_files_says_so(tiny: Path) -> None:
    (layer,) = layer_costs(Checkpoint.open(tiny), [LayerUse("adapter.up", (), "dense", 6, 24, 24)])
    assert (layer.stored_bytes, layer.packed, layer.dense_fallback) == (None, False, False)
    assert layer.tensor_class == "other"

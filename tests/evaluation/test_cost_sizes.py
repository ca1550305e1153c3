"""Bytes by tensor class against the files themselves, for every family, dense and packed."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from compress.artifact.reader import Artifact
from compress.evaluation.costs.record import SizeRecord
from compress.evaluation.costs.sizes import classify, size_record, stored_modules
from compress.models.checkpoint import Checkpoint
from compress.runtime.transformers_backend import load
from tests.tiny_models import FAMILIES, tiny_model

# Whole last parts of names, per class: written down from the architectures, apart from the patterns under test.
LINEARS = {
    "attention": "q_proj k_proj v_proj o_proj out_proj qkv_proj c_attn query_key_value dense q_a_proj q_b_proj "
    "kv_a_proj_with_mqa kv_b_proj",
    "mlp": "gate_proj up_proj down_proj gate_up_proj c_fc fc1 fc2 dense_h_to_4h dense_4h_to_h",
    "embedding": "embed_tokens embed_positions wte wpe embed_in",
    "head": "lm_head embed_out",
    "router": "gate",
    "other": "project_in project_out",
}


def expected(module: str) -> str:
    last = module.split(".")[-1]
    if ".experts." in module or ".shared_experts." in module:
        return "experts"
    if last == "c_proj":
        return "attention" if ".attn." in module else "mlp"
    return next((name for name, parts in LINEARS.items() if last in parts.split()), "norms")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_every_family_is_classified(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_model(family, tmp_path / family))
    modules = stored_modules(checkpoint)
    assert {name: stored.tensor_class for name, stored in modules.items()} == {n: expected(n) for n in modules}
    parameters = load(checkpoint.path, device="cpu").parameters()
    found = size_record(checkpoint, parameters)
    assert found.file_bytes == (checkpoint.path / "model.safetensors").stat().st_size
    assert sum(each.bytes for each in found.classes) == checkpoint.nbytes
    buffers = sum(math.prod(i.shape) for n, i in checkpoint.index.items() if n.endswith("e_score_correction_bias"))
    assert sum(each.weights for each in found.classes) - buffers == parameters == found.weights
    assert sum(each.tensors for each in found.classes) == len(checkpoint.index)
    assert {each.bits_per_weight for each in found.classes} == {32.0}
    assert found.bits_per_weight == pytest.approx(8 * (found.file_bytes - found.header_bytes) / parameters)


def test_packed_weights_count_as_what_they_stand_for(artifact: Path, tiny: Path) -> None:
    dense, packed = (size_record(Checkpoint.open(path), 1) for path in (tiny, artifact))
    before, after = ({each.name: each for each in record.classes} for record in (dense, packed))
    for name in before:
        assert after[name].weights == before[name].weights
    tensors = load_file(artifact / "model.safetensors")
    scales = sum(t.nbytes for name, t in tensors.items() if re.search(r"weight_(scale|shape|zero_point)$", name))
    assert after["scales"].bytes == scales > 0
    assert after["scales"].bits_per_weight is None
    mlp = [t.nbytes for name, t in tensors.items() if ".mlp." in name]
    assert 8 * sum(mlp) / after["mlp"].weights == after["mlp"].bits_per_weight
    assert after["mlp"].bytes + after["mlp"].scale_bytes == sum(mlp)
    assert after["norms"].bytes == sum(math.prod(t.shape) * t.itemsize for n, t in tensors.items() if "norm" in n)


def test_bits_agree_with_the_manifest(artifact: Path) -> None:
    """The manifest counts codes and scales of the quantised weights, not the packed tensors' shapes and no biases."""
    sizes = Artifact.open(artifact).manifest.sizes
    modules = stored_modules(Checkpoint.open(artifact))
    packed = {name: module for name, module in modules.items() if module.packed}
    assert len(packed) == 14
    tensors = load_file(artifact / "model.safetensors")
    left_out = sum(t.nbytes for n, t in tensors.items() if n.endswith((".weight_shape", ".bias")))
    bits = 8 * (sum(m.bytes + m.scale_bytes for m in packed.values()) - left_out) / sizes.quantized_parameters
    assert bits == pytest.approx(sizes.bits_per_weight, abs=1e-5)
    whole = size_record(Checkpoint.open(artifact), sizes.parameters)
    assert whole.bits_per_weight == pytest.approx(sizes.file_bits_per_weight, abs=1e-6)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("gpt_neox.layers.0.attention", "other"),  # a mask kept as a buffer
        ("model.layers.0.self_attn.rotary_emb", "other"),
        ("model.layers.0.self_attn.q_norm", "norms"),
        ("model.layers.1.mlp.experts", "experts"),
        ("model.layers.0.mlp.shared_expert.up_proj", "experts"),
        ("something.new", "other"),
    ],
)
def test_names_at_the_edges(module: str, name: str) -> None:
    assert classify(module) == name


def test_an_unknown_architecture_can_be_weighed(tiny: Path, tmp_path: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    (tmp_path / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
    assert size_record(Checkpoint.open(tmp_path), 5).classes == size_record(Checkpoint.open(tiny), 5).classes


def test_a_record_that_does_not_add_up_is_refused(tiny: Path) -> None:
    whole = size_record(Checkpoint.open(tiny), 5).model_dump()
    with pytest.raises(ValueError, match="do not add up"):
        SizeRecord.model_validate({**whole, "header_bytes": whole["header_bytes"] + 1})

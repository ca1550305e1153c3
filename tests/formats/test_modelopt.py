"""ModelOpt's FP8 layout: shapes and configs as its own export writes them, and scales that lose nothing."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compress.errors import IntegrityError
from compress.formats.fp8 import encode
from compress.formats.modelopt import (
    ALGORITHMS,
    config_file,
    config_refusal,
    pack,
    quantization_config,
    schemes,
    shape_refusal,
    unpack,
)
from compress.types import Fp8Scheme, QuantizedTensor

SHAPES = {"FP8": (), "FP8_PER_CHANNEL_PER_TOKEN": (256,), "FP8_PB_WO": (2, 1, 3, 1)}


def weight_of(scheme: Fp8Scheme) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(0)
    scale = (torch.rand(scheme.scale_shape(256, 384), generator=generator) + 0.01).bfloat16()
    return QuantizedTensor(encode(100 * torch.randn(256, 384, generator=generator)), scale, None, scheme)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_linear_is_stored_as_modelopt_stores_it(algorithm: str) -> None:
    weight = weight_of(ALGORITHMS[algorithm])
    static = torch.tensor([0.25], dtype=torch.bfloat16) if algorithm == "FP8" else None
    stored = pack(weight, static)
    assert stored["weight_scale"].shape == SHAPES[algorithm]
    assert {tensor.dtype for name, tensor in stored.items() if name != "weight"} == {torch.float32}
    if static is not None:
        assert stored["input_scale"].shape == ()
        assert float(stored["input_scale"]) == 0.25
    again = unpack(stored, weight.scheme)
    assert torch.equal(again.codes.float(), weight.codes.float())
    assert torch.equal(again.scale, weight.scale.float())
    assert torch.equal(again.dequantize(), weight.dequantize())


def test_both_configs_say_what_modelopt_says() -> None:
    names = {"model.layers.0.mlp.down_proj": ALGORITHMS["FP8"]}
    inline = quantization_config(names, ["lm_head"])
    kind = {"dynamic": False, "num_bits": 8, "type": "float"}
    assert inline == {
        "config_groups": {"group_0": {"input_activations": kind, "weights": kind, "targets": ["Linear"]}},
        "ignore": ["lm_head"],
        "quant_algo": "FP8",
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quant_method": "modelopt",
    }
    assert json.loads(config_file(inline)) == {
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]},
    }


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_config_is_read_back(algorithm: str) -> None:
    names = dict.fromkeys(["a", "b"], ALGORITHMS[algorithm])
    assert schemes(quantization_config(names, []), ["a", "b"]) == names
    with pytest.raises(IntegrityError, match="INT4_AWQ cannot be read here"):
        schemes(quantization_config(names, []) | {"quant_algo": "INT4_AWQ"}, ["a"])


def test_what_modelopt_cannot_say_is_refused_by_name() -> None:
    found = config_refusal({"a": ALGORITHMS["FP8"], "b": ALGORITHMS["FP8_PB_WO"]}, [])
    assert found is not None
    assert "FP8_BLOCK and FP8_STATIC" in found.reason
    found = config_refusal({"layers.0.mlp.gate_proj": ALGORITHMS["FP8"]}, ["layers.0.mlp.gate"])
    assert found is not None
    assert "match parts of names" in found.reason
    found = shape_refusal(ALGORITHMS["FP8_PB_WO"], 192, 256)
    assert found is not None
    assert "192 x 256" in found.reason
    assert shape_refusal(ALGORITHMS["FP8"], 191, 255) is None


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda t: t.pop("weight"), "lacks 'weight'"),
        (lambda t: t.pop("weight_scale"), "lacks 'weight_scale'"),
        (lambda t: t.update(weight=t["weight"].float()), "weight is"),
        (lambda t: t.update(weight_scale=t["weight_scale"].bfloat16()), "weight_scale is"),
        (lambda t: t.update(weight_scale=t["weight_scale"][:-1]), "weight_scale is"),
    ],
)
def test_stored_tensors_that_do_not_fit_are_refused(spoil: Callable[[dict[str, Tensor]], object], match: str) -> None:
    weight = weight_of(ALGORITHMS["FP8_PER_CHANNEL_PER_TOKEN"])
    stored = pack(weight, None)
    spoil(stored)
    with pytest.raises(IntegrityError, match=match):
        unpack(stored, weight.scheme)

"""ModelOpt's FP8 layout: shapes and configs as its own export writes them, and scales that lose nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compress.errors import IntegrityError, UserError
from compress.formats.fp8 import encode
from compress.formats.modelopt import (
    ALGORITHMS,
    config_file,
    config_refusal,
    decode,
    input_scale,
    layout,
    pack,
    quantization_config,
    schemes,
    shape_refusal,
    unpack,
    value_refusal,
)
from compress.quantization import block_floats
from compress.types import BlockFloatScheme, Fp8Scheme, QuantizedTensor

SHAPES = {"FP8": (), "FP8_PER_CHANNEL_PER_TOKEN": (256,), "FP8_PB_WO": (2, 1, 3, 1)}


def weight_of(scheme: Fp8Scheme | BlockFloatScheme) -> QuantizedTensor:
    assert isinstance(scheme, Fp8Scheme)
    generator = torch.Generator().manual_seed(0)
    scale = (torch.rand(scheme.scale_shape(256, 384), generator=generator) + 0.01).bfloat16()
    return QuantizedTensor(encode(100 * torch.randn(256, 384, generator=generator)), scale, None, scheme)


@pytest.mark.parametrize("algorithm", SHAPES)
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


# Codes 0 to 15 in one block, as ModelOpt 0.47 packs and decodes them: even inputs in the low half of a byte.
GOLDEN_BYTES = [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
GOLDEN_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def test_words_of_nvfp4_decode_by_the_table() -> None:
    stored = {
        "weight": torch.tensor([GOLDEN_BYTES], dtype=torch.uint8),
        "weight_scale": torch.tensor([[1.5]]).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(0.25),
    }
    scheme = ALGORITHMS["W4A16_NVFP4"]
    assert (decode(stored, scheme) / 0.375).tolist() == [GOLDEN_VALUES]
    assert torch.equal(unpack(stored, scheme).dequantize(), decode(stored, scheme))
    stored["weight_scale_2"] = torch.tensor(0.3)  # as ModelOpt's own are: no power of two
    assert decode(stored, scheme)[0, 7] == (torch.tensor(6.0) * (torch.tensor(1.5) * torch.tensor(0.3))).bfloat16()
    with pytest.raises(UserError, match="no power of two"):
        unpack(stored, scheme)
    with pytest.raises(IntegrityError, match="weight_scale_2 is not one positive number"):
        decode(stored | {"weight_scale_2": torch.tensor(0.0)}, scheme)


@pytest.mark.parametrize("algorithm", ["NVFP4", "W4A16_NVFP4"])
def test_nvfp4_is_stored_with_factors_where_compressed_tensors_divides(algorithm: str) -> None:
    scheme = ALGORITHMS[algorithm]
    assert isinstance(scheme, BlockFloatScheme)
    values = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    weight = block_floats.transform(values, scheme, search=False)
    assert weight.divisor is not None
    static = None if scheme.inputs is None else torch.tensor([512.0])
    stored = pack(weight, static)
    rules = layout(scheme, 32, 64)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()} == rules
    assert float(stored["weight_scale_2"]) == 1 / float(weight.divisor)
    assert torch.equal(decode(stored, scheme), weight.dequantize())
    assert torch.equal(unpack(stored, scheme).dequantize(), weight.dequantize())
    if static is not None:
        assert float(stored["input_scale"]) == 1 / 512
        assert torch.equal(input_scale(stored, scheme), static)
    assert value_refusal(weight) is None
    found = value_refusal(replace(weight, divisor=torch.tensor([2688 / 3.3])))
    assert found is not None
    assert "does not hold exactly" in found.reason


def test_both_configs_of_nvfp4_are_those_that_modelopt_writes() -> None:
    inline = quantization_config({"a": ALGORITHMS["NVFP4"]}, ["lm_head"])
    kind = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    assert inline["config_groups"] == {"group_0": {"input_activations": kind, "weights": kind, "targets": ["Linear"]}}
    assert json.loads(config_file(inline))["quantization"] == {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "exclude_modules": ["lm_head"],
    }
    weights_alone = quantization_config({"a": ALGORITHMS["W4A16_NVFP4"]}, [])
    assert weights_alone["config_groups"] == {"group_0": {"weights": kind, "targets": ["Linear"]}}

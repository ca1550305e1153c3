"""BitNet's layout: words by the definition, transformers' own unpacking of them, and what is refused."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.bitnet import ActQuant, pack_weights, unpack_weights

from compress.errors import IntegrityError
from compress.formats import bitnet
from compress.formats.inputs import round_inputs
from compress.types import QuantizedTensor, ternary_scheme

SCHEME = ternary_scheme()


def ternary(out: int = 16, width: int = 24) -> QuantizedTensor:
    codes = torch.randint(-1, 2, (out, width), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    return QuantizedTensor(codes, torch.full((out, 1), 0.125, dtype=torch.bfloat16), None, SCHEME)


def test_words_by_the_definition() -> None:
    codes = torch.tensor([[-1, 0], [0, 1], [1, -1], [1, 1]], dtype=torch.int8)
    stored = bitnet.pack(QuantizedTensor(codes, torch.full((4, 1), 0.5), None, SCHEME))
    assert stored["weight"].tolist() == [[0b10_10_01_00, 0b10_00_10_01]]
    assert stored["weight_scale"].tolist() == [0.5]


def test_transformers_packs_and_unpacks_the_same() -> None:
    weight = ternary()
    stored = bitnet.pack(weight)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(stored["weight"], pack_weights(weight.codes.clone()))
        assert torch.equal(unpack_weights(stored["weight"], torch.float32), weight.codes.float())
    again = bitnet.unpack(stored, SCHEME)
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.dequantize(), weight.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_rounded_as_transformers_rounds_them(dtype: torch.dtype) -> None:
    x = torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[0, 0] = 0
    assert SCHEME.inputs is not None
    with torch.compiler.set_stance("force_eager"):
        wanted = ActQuant.apply(x.clone())
    assert torch.equal(round_inputs(x, SCHEME.inputs), wanted)


def test_what_is_not_ternary_is_refused() -> None:
    weight = ternary()
    assert bitnet.value_refusal(weight) is None
    weight.codes[0, 0] = -2
    with pytest.raises(IntegrityError, match="not ternary"):
        bitnet.pack(weight)
    uneven = ternary()
    uneven.scale[0] = 1
    found = bitnet.value_refusal(uneven)
    assert found is not None
    assert "one scale" in found.reason
    assert bitnet.shape_refusal(SCHEME, 18, 24) is not None
    stored = bitnet.pack(ternary())
    for spoiled in (
        {**stored, "weight": stored["weight"] | 3},
        {**stored, "weight": stored["weight"].int()},
        {**stored, "weight_scale": torch.ones(16, 1)},
        {"weight": stored["weight"]},
    ):
        with pytest.raises(IntegrityError):
            bitnet.unpack(spoiled, SCHEME)


def test_the_config_is_read_back_and_others_are_refused() -> None:
    config = bitnet.quantization_config({"a": SCHEME}, ["lm_head"])
    assert config["modules_to_not_convert"] == ["lm_head"]
    assert bitnet.schemes(config, ["a"]) == {"a": SCHEME}
    for change in ({"linear_class": "bitlinear"}, {"quantization_mode": "online"}, {"use_rms_norm": True}):
        with pytest.raises(IntegrityError, match="cannot be read here"):
            bitnet.schemes(config | change, ["a"])

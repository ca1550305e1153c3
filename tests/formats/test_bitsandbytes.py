"""NF4 as bitsandbytes stores it: its code tables, its byte order, its scales of scales, and what is refused.

The words were made with bitsandbytes 0.50.2: `quantize_4bit(..., compress_statistics=True, quant_type="nf4")`.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compress.errors import IntegrityError
from compress.formats import bitsandbytes
from compress.formats.dynamic_codes import dynamic_table, nearest
from compress.quantization import normal_floats
from compress.types import NF4, NormalFloatScheme, QuantizedTensor

SCHEME = NormalFloatScheme()
GOLDEN_CODES = (
    "0000000000011111111111111111222222222233333333344444445555555666"
    "666677777888899999aaaaabbbbbbccccccddddddddeeeeeeeeeeeeeffffffff"
)
GOLDEN_SCALES = [255, 0]
GOLDEN_RANGE = 0.1015625
GOLDEN_STATE = (
    '{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [2, 64], '
    '"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.9921875}'
)
GOLDEN_DECODED = [
    [-1.09375, -1.09375, -1.09375, -1.09375],
    [0.891339123249054, 0.891339123249054, 0.891339123249054, 0.891339123249054],
]
GOLDEN_TABLE = [-0.992968738079071, -0.9789062738418579, 0.0, 5.500000384017767e-07, 0.992968738079071, 1.0]


def golden() -> dict[str, Tensor]:
    """What bitsandbytes makes of (arange(128) - 70) / 64 in two rows of 64."""
    state = GOLDEN_STATE.encode()
    return {
        "weight": torch.tensor(list(bytes.fromhex(GOLDEN_CODES)), dtype=torch.uint8).unsqueeze(1),
        "weight.absmax": torch.tensor(GOLDEN_SCALES, dtype=torch.uint8),
        "weight.nested_absmax": torch.tensor([GOLDEN_RANGE]),
        "weight.quant_map": torch.tensor(NF4),
        "weight.nested_quant_map": dynamic_table(),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state), dtype=torch.uint8),
    }


def random_weight(out: int = 24, width: int = 320, dtype: torch.dtype = torch.bfloat16) -> QuantizedTensor:
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(0)) * 0.02
    return normal_floats.transform(weight, SCHEME, dtype, search=False)


def test_words_of_bitsandbytes_decode_to_its_own_numbers() -> None:
    found = bitsandbytes.unpack(golden(), SCHEME).dequantize()
    assert found.dtype == torch.float32
    assert found[0, :4].tolist() == GOLDEN_DECODED[0]
    assert found[1, -4:].tolist() == GOLDEN_DECODED[1]
    packed = bitsandbytes.pack(bitsandbytes.unpack(golden(), SCHEME))
    assert packed.keys() == golden().keys()
    assert all(torch.equal(packed[name], tensor) for name, tensor in golden().items())


def test_the_dynamic_table_is_the_published_one() -> None:
    table = dynamic_table()
    assert len(table) == len(set(table.tolist())) == 256
    assert table[[0, 1, 127, 128, 254, 255]].tolist() == GOLDEN_TABLE
    assert nearest(table, table).tolist() == list(range(256))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_packing_loses_nothing(dtype: torch.dtype) -> None:
    weight = random_weight(dtype=dtype)
    stored = bitsandbytes.pack(weight)
    rules = bitsandbytes.layout(SCHEME, 24, 320)
    assert {name: (tuple(stored[name].shape), stored[name].dtype) for name in rules} == rules
    again = bitsandbytes.unpack(stored, SCHEME)
    assert again.dequantize().dtype == dtype
    assert torch.equal(again.dequantize(), weight.dequantize())
    bits = 8 * sum(stored[name].nbytes for name in rules) / weight.codes.numel()
    assert SCHEME.bits_per_weight(320, 16, 24) == pytest.approx(bits)


def test_searched_scales_lose_less() -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    loss = {
        search: float((normal_floats.transform(weight, SCHEME, torch.float32, search).dequantize() - weight).norm())
        for search in (False, True)
    }
    assert loss[True] < 0.95 * loss[False]


def test_codes_are_the_nearest_for_the_scales_that_are_stored() -> None:
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(2))
    found = normal_floats.transform(weight, SCHEME, torch.float32, search=False)
    assert found.nested is not None
    scale = found.nested.decode(found.scale).repeat_interleave(64, 1)
    candidates = torch.tensor(NF4).reshape(-1, 1, 1) * scale
    assert torch.equal((candidates - weight).abs().amin(0), (found.dequantize() - weight).abs())


@pytest.mark.parametrize("search", [False, True])
def test_zeros_and_equal_blocks_have_codes(search: bool) -> None:
    weight = torch.zeros(4, 128)
    assert not normal_floats.transform(weight, SCHEME, torch.float32, search).dequantize().any()
    weight[:, ::2] = 0.5  # all scales alike: no range around their mean
    found = normal_floats.transform(weight, SCHEME, torch.float32, search)
    assert torch.equal(found.dequantize(), weight)
    weight[0] *= 1000  # small scales lie where the code of scales is coarse
    found = normal_floats.transform(weight, SCHEME, torch.float32, search)
    assert torch.isfinite(found.dequantize()).all()
    assert not found.dequantize()[:, 1::2].any()


def say(key: str, value: object) -> Callable[[dict[str, Tensor]], None]:
    """Changes one entry of the JSON."""

    def change(stored: dict[str, Tensor]) -> None:
        said = json.loads(bytes(stored[bitsandbytes.STATE].tolist())) | {key: value}
        stored[bitsandbytes.STATE] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    return change


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda t: t.pop("weight"), "lacks 'weight'"),
        (lambda t: t.pop(bitsandbytes.STATE), "lacks 'weight.quant_state"),
        (lambda t: t.update({bitsandbytes.SCALE: t[bitsandbytes.SCALE][:-1]}), "absmax is"),
        (lambda t: t.update({bitsandbytes.CODES: t[bitsandbytes.CODES] * 2}), "not the table of NF4"),
        (lambda t: t.update({bitsandbytes.STATE: t[bitsandbytes.STATE][:-3]}), "does not describe NF4"),
        (say("quant_type", "fp4"), "does not describe NF4"),
        (say("blocksize", 128), "does not describe NF4"),
        (say("dtype", "int8"), "does not describe NF4"),
        (say("shape", [24, 319]), "do not divide the width 319"),
        (say("shape", [12, 320]), "weight is"),
    ],
)
def test_stored_tensors_that_do_not_fit_are_refused(spoil: Callable[[dict[str, Tensor]], object], match: str) -> None:
    stored = bitsandbytes.pack(random_weight())
    spoil(stored)
    with pytest.raises(IntegrityError, match=match):
        bitsandbytes.unpack(stored, SCHEME)


def test_the_config_is_read_back_and_others_are_refused() -> None:
    config = bitsandbytes.quantization_config({"a": SCHEME}, ["lm_head"])
    assert config["llm_int8_skip_modules"] == ["lm_head"]
    assert bitsandbytes.schemes(config, ["a"]) == {"a": SCHEME}
    for change in ({"bnb_4bit_quant_type": "fp4"}, {"bnb_4bit_use_double_quant": False}, {"load_in_4bit": False}):
        with pytest.raises(IntegrityError, match="cannot be read here"):
            bitsandbytes.schemes(config | change, ["a"])
    found = bitsandbytes.config_refusal({"layers.0.mlp.gate_proj": SCHEME}, ["layers.0.mlp.gate"])
    assert found is not None
    assert "parts of names" in found.reason

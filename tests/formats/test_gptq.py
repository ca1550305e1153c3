"""GPTQ's checkpoint layout, versions 1 and 2, against golden words and against a straight reading of its definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import IntegrityError, UserError
from compress.formats.gptq import (
    Version,
    decode,
    pack,
    quantization_config,
    schemes,
    shape_refusal,
    unpack,
    value_refusal,
    version_of,
)
from compress.types import IntScheme, QuantizedTensor
from tests.formats.packed import random_weight, signed

ZEROS = {2: ([0x55555555], [0xAAAAAAAA]), 4: ([0x77777777], [0x88888888]), 8: ([0x7F7F7F7F], [0x80808080])}
ZEROS[3] = ([0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D], [0x24924924, 0x49249249, 0x92492492])


def fields(words: list[int], bits: int, count: int) -> list[int]:
    """The codes of a dense little-endian stream of words."""
    stream = sum((word & 0xFFFFFFFF) << 32 * place for place, word in enumerate(words))
    return [stream >> bits * i & (1 << bits) - 1 for i in range(count)]


def decoded(stored: dict[str, Tensor], bits: int, version: Version) -> Tensor:
    """The weight (out, in) float16 as the definition says it: (code - zero) * scale of the group that g_idx names."""
    columns, rows = stored["qweight"].T.tolist(), stored["qzeros"].tolist()
    width, out = len(stored["g_idx"]), len(columns)
    codes = torch.tensor([fields(column, bits, width) for column in columns])
    zeros = torch.tensor([fields(row, bits, out) for row in rows])
    if version == 1:
        zeros = zeros + 1 & (1 << bits) - 1
    groups = stored["g_idx"].long()
    return ((codes - zeros.T[:, groups]) * stored["scales"].T[:, groups]).to(torch.float16)


def weight_for(version: Version, bits: int, groups: int, size: int, symmetric: bool, seed: int) -> QuantizedTensor:
    """A random weight that the version carries."""
    found = random_weight(bits, 32, groups, size, symmetric, seed, torch.float16)
    if version == 2 or found.zero_point is None:
        return found
    zero = found.zero_point.clamp(min=found.scheme.qmin + 1)
    return QuantizedTensor(found.codes, found.scale, zero, found.scheme)


@pytest.mark.parametrize("bits", sorted(ZEROS))
def test_golden_words_of_symmetric_zero_points(bits: int) -> None:
    weight = random_weight(bits, 32, 1, 32, symmetric=True, dtype=torch.float16)
    for version, words in zip((1, 2), ZEROS[bits], strict=True):
        stored = pack(weight, version)["qzeros"].tolist()
        assert stored == [signed(words) * (bits // len(words))]


def test_golden_words_of_the_weight() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).reshape(1, 16).repeat(8, 1)
    weight = QuantizedTensor(codes, torch.ones(8, 2, dtype=torch.float16), None, IntScheme(4, 8))
    stored = pack(weight, 1)
    assert stored["qweight"].T.tolist() == [signed([0x76543210, 0xFEDCBA98])] * 8
    assert stored["g_idx"].tolist() == [0] * 8 + [1] * 8
    assert stored["scales"].shape == (2, 8)


@settings(max_examples=40, deadline=None)
@given(
    version=st.sampled_from([1, 2]),
    bits=st.sampled_from([2, 3, 4, 8]),
    groups=st.integers(1, 3),
    size=st.sampled_from([32, 64]),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**30),
)
def test_a_linear_is_what_the_definition_says(
    version: Version, bits: int, groups: int, size: int, symmetric: bool, seed: int
) -> None:
    weight = weight_for(version, bits, groups, size, symmetric, seed)
    stored = pack(weight, version)
    assert torch.equal(decoded(stored, bits, version), weight.dequantize())
    assert torch.equal(decode(stored, weight.scheme, version), weight.dequantize())
    again = unpack(stored, weight.scheme, version)
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.scale, weight.scale)
    assert (again.zero_point is None) == symmetric
    if weight.zero_point is not None and again.zero_point is not None:
        assert torch.equal(again.zero_point, weight.zero_point)


def test_the_versions_differ_by_one_in_every_zero_point() -> None:
    weight = weight_for(1, 4, 2, 32, False, 3)
    one, two = pack(weight, 1), pack(weight, 2)
    assert torch.equal(one["qzeros"].long() + 0x11111111 & 0xFFFFFFFF, two["qzeros"].long() & 0xFFFFFFFF)
    assert all(torch.equal(one[name], two[name]) for name in ("qweight", "scales", "g_idx"))


def test_version_1_has_no_place_for_a_zero_point_of_zero() -> None:
    weight = random_weight(4, 32, 2, 32, symmetric=False, dtype=torch.float16)
    assert weight.zero_point is not None
    weight.zero_point[3, 1] = -8
    found = value_refusal(weight, 1)
    assert found is not None
    assert "gptq-v2" in found.hint
    assert value_refusal(weight, 2) is None
    with pytest.raises(IntegrityError, match="no place in gptq v1"):
        pack(weight, 1)
    wrapped = pack(weight, 2)  # what other tools write: zero less one, within four bits
    wrapped["qzeros"] = ((wrapped["qzeros"].long() & 0xFFFFFFFF) - 0x11111111).to(torch.int32)
    fixed = pack(QuantizedTensor(weight.codes, weight.scale, weight.zero_point.clamp(min=-7), weight.scheme), 1)
    row, word = fixed["qzeros"][1].tolist(), 3 // 8
    row[word] = row[word] & ~(15 << 12) | (15 << 12)
    fixed["qzeros"][1] = torch.tensor(row, dtype=torch.int64).to(torch.int32)
    zero = unpack(fixed, weight.scheme, 1).zero_point
    assert zero is not None
    assert int(zero[3, 1]) == -8


def test_groups_in_activation_order_are_decoded_and_not_unpacked() -> None:
    weight = weight_for(1, 4, 4, 32, False, 5)
    stored = pack(weight, 1)
    stored["g_idx"] = stored["g_idx"][torch.randperm(128, generator=torch.Generator().manual_seed(0))]
    assert torch.equal(decode(stored, weight.scheme, 1), decoded(stored, 4, 1))
    with pytest.raises(UserError, match="follow the activation order") as error:
        unpack(stored, weight.scheme, 1)
    assert "--to dense" in error.value.hint
    stored["g_idx"][0] = 4
    with pytest.raises(IntegrityError, match=r"outside 0\.\.3"):
        decode(stored, weight.scheme, 1)


def test_a_symmetric_config_over_other_zero_points_is_refused() -> None:
    stored = pack(weight_for(1, 4, 2, 32, False, 7), 1)
    with pytest.raises(IntegrityError, match="the config says sym"):
        unpack(stored, IntScheme(4, 32), 1)


@pytest.mark.parametrize("version", [1, 2])
def test_the_config_is_read_back(version: Version) -> None:
    names = {f"model.layers.{i}.mlp.down_proj": IntScheme(4, 128) for i in range(12)}
    names["model.layers.1.mlp.gate_proj"] = IntScheme(8, None, symmetric=False)
    names["model.layers.1.self_attn.o_proj"] = IntScheme(4, 128)
    config = quantization_config(names, ["model.layers.2.self_attn.q_proj", "lm_head"], version)
    assert version_of(config) == version
    assert schemes(config, list(names)) == names
    base = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False, "lm_head": False, "pack_dtype": "int32"}
    assert base.items() <= config.items()
    # Engines that join q, k and v, gate and up, ask about the joint name.
    assert list(config["dynamic"]) == [
        r"+:^model\.layers\.1\.mlp\.(?:gate_proj|gate_up_proj)$",
        "-:^lm_head$",
        r"-:^model\.layers\.2\.self_attn\.(?:q_proj|qkv_proj)$",
    ]


@pytest.mark.parametrize(
    "other",
    [{"bits": 5}, {"bits": "4"}, {"group_size": 0}, {"group_size": None}, {"dynamic": ["+:.*"]}],
)
def test_configs_that_are_not_read_are_refused(other: dict[str, Any]) -> None:
    config = quantization_config({"a": IntScheme(4, 128)}, [], 1) | other
    with pytest.raises(IntegrityError):
        schemes(config, ["a"])


def test_other_checkpoint_formats_have_no_version() -> None:
    config = quantization_config({"a": IntScheme(4, 128)}, [], 1)
    assert version_of({"bits": 4}) == 1
    assert version_of(config | {"checkpoint_format": "marlin"}) is None


def test_widths_that_fill_no_word_are_refused() -> None:
    assert shape_refusal(IntScheme(4, 8), 32, 24) is None
    for out, width in ((32, 20), (20, 32)):
        found = shape_refusal(IntScheme(4, 4), out, width)
        assert found is not None
        assert "20" in found.reason


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda t: t.pop("qweight"), "lacks 'qweight'"),
        (lambda t: t.pop("g_idx"), "lacks 'g_idx'"),
        (lambda t: t.update(qweight=t["qweight"][:-1]), "which group size 32 does not divide"),
        (lambda t: t.update(qweight=t["qweight"].to(torch.int64)), "qweight is"),
        (lambda t: t.update(qzeros=t["qzeros"][:1]), "qzeros is"),
        (lambda t: t.update(scales=t["scales"][:, :-1]), "scales is"),
        (lambda t: t.update(g_idx=t["g_idx"].long()), "g_idx is"),
    ],
)
def test_stored_tensors_that_do_not_fit_are_refused(spoil: Callable[[dict[str, Tensor]], object], match: str) -> None:
    weight = weight_for(1, 4, 2, 32, False, 0)
    stored = pack(weight, 1)
    spoil(stored)
    with pytest.raises(IntegrityError, match=match):
        unpack(stored, weight.scheme, 1)

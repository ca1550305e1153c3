"""AutoAWQ's gemm layout against golden words and against a straight reading of its definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import IntegrityError
from compress.formats.awq import (
    config_refusal,
    pack,
    pack_columns,
    quantization_config,
    schemes,
    shape_refusal,
    unpack,
    unpack_columns,
)
from compress.types import IntScheme, QuantizedTensor
from tests.formats.packed import random_weight, signed


def decoded(stored: dict[str, Tensor]) -> Tensor:
    """The weight (out, in) float16 as the definition of the layout says it, word by word and nibble by nibble."""
    order = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of each of eight consecutive columns

    def columns(words: Tensor) -> Tensor:
        spread = [[word >> 4 * order[j] & 15 for word in row for j in range(8)] for row in words.tolist()]
        return torch.tensor(spread, dtype=torch.int32)

    codes, zeros, scales = columns(stored["qweight"]), columns(stored["qzeros"]), stored["scales"]
    size = len(codes) // len(zeros)
    return ((codes - zeros.repeat_interleave(size, 0)) * scales.repeat_interleave(size, 0)).T


def test_golden_word() -> None:
    codes = torch.arange(-8, 0, dtype=torch.int8).reshape(1, 8)  # unsigned 0..7
    assert pack_columns(codes).tolist() == [[0x75316420]]
    assert pack_columns(codes + 8).tolist() == [signed([0xFDB9ECA8])]


def test_a_symmetric_weight_has_zero_points_of_eight() -> None:
    stored = pack(random_weight(4, 16, 2, 32, symmetric=True, dtype=torch.float16))
    assert set(stored["qzeros"].flatten().tolist()) == set(signed([0x88888888]))


@settings(max_examples=30, deadline=None)
@given(
    words=st.integers(1, 5),
    groups=st.integers(1, 4),
    size=st.integers(1, 40),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**30),
)
def test_a_linear_is_what_the_definition_says(words: int, groups: int, size: int, symmetric: bool, seed: int) -> None:
    weight = random_weight(4, 8 * words, groups, size, symmetric, seed, torch.float16)
    stored = pack(weight)
    assert torch.equal(decoded(stored), weight.dequantize())
    again = unpack(stored, IntScheme(4, size, symmetric=False))
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.scale, weight.scale)
    assert again.zero_point is not None
    wanted = torch.zeros_like(again.zero_point) if weight.zero_point is None else weight.zero_point
    assert torch.equal(again.zero_point, wanted)
    assert torch.equal(again.dequantize(), weight.dequantize())


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 6), words=st.integers(1, 6), seed=st.integers(0, 2**30))
def test_columns_come_back(rows: int, words: int, seed: int) -> None:
    codes = torch.randint(-8, 8, (rows, 8 * words), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    assert torch.equal(unpack_columns(pack_columns(codes)), codes)


def test_bfloat16_scales_are_stored_where_float16_holds_them_and_refused_elsewhere() -> None:
    weight = random_weight(4, 8, 1, 32, symmetric=True, dtype=torch.bfloat16)
    assert torch.equal(pack(weight)["scales"].float(), weight.scale.T.float())
    tiny = QuantizedTensor(weight.codes, weight.scale * 2.0**-30, None, weight.scheme)
    with pytest.raises(IntegrityError, match="is no number of"):
        pack(tiny)


def test_the_config_is_read_back() -> None:
    names = {f"model.layers.0.mlp.{name}": IntScheme(4, 64) for name in ("gate_proj", "down_proj")}
    config = quantization_config(names, ["lm_head"])
    assert config == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    assert schemes(config, list(names)) == dict.fromkeys(names, IntScheme(4, 64, symmetric=False))
    per_channel = quantization_config({"a": IntScheme(4, None)}, [])
    assert schemes(per_channel, ["a"]) == {"a": IntScheme(4, None, symmetric=False)}


@pytest.mark.parametrize("other", [{"version": "gemv"}, {"bits": 3}, {"group_size": 0}, {"group_size": "128"}])
def test_configs_of_other_layouts_are_refused(other: dict[str, object]) -> None:
    config = quantization_config({"a": IntScheme(4, 128)}, []) | other
    with pytest.raises(IntegrityError, match="cannot be read here"):
        schemes(config, ["a"])


def test_what_awq_cannot_say_is_refused_by_name() -> None:
    mixed = {"a": IntScheme(4, 64), "b": IntScheme(4, None)}
    found = config_refusal(mixed, [])
    assert found is not None
    assert "have 64 and channel" in found.reason
    found = config_refusal({"layers.0.mlp.gate_proj": IntScheme(4, 64)}, ["lm_head", "layers.0.mlp.gate"])
    assert found is not None
    assert "would leave out layers.0.mlp.gate_proj" in found.reason
    assert config_refusal({"layers.0.mlp.gate_proj": IntScheme(4, 64)}, ["layers.1.mlp.gate"]) is None
    found = shape_refusal(IntScheme(4, 64), 12, 64)
    assert found is not None
    assert "do not divide 12" in found.reason


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda t: t.pop("qweight"), "lacks 'qweight'"),
        (lambda t: t.pop("qzeros"), "lacks 'qzeros'"),
        (lambda t: t.pop("scales"), "lacks 'scales'"),
        (lambda t: t.update(qweight=t["qweight"].to(torch.int64)), "qweight is"),
        (lambda t: t.update(qweight=t["qweight"].flatten()), "qweight is"),
        (lambda t: t.update(qweight=t["qweight"][:-1]), "qzeros is|scales is|groups"),
        (lambda t: t.update(qzeros=t["qzeros"][:, :-1]), "qzeros is"),
        (lambda t: t.update(scales=t["scales"].float()), "scales is"),
    ],
)
def test_stored_tensors_that_do_not_fit_are_refused(spoil: Callable[[dict[str, Tensor]], object], match: str) -> None:
    stored = pack(random_weight(4, 32, 2, 32, symmetric=False, dtype=torch.float16))
    spoil(stored)
    with pytest.raises(IntegrityError, match=match):
        unpack(stored, IntScheme(4, 32, symmetric=False))

"""One byte per weight: the package reads what is written, and what contradicts the scheme is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from compress.errors import IntegrityError
from compress.formats import layouts
from compress.quantization.grid import min_max_grid, quantize
from compress.schemes import FIXED_SCHEMES
from compress.types import IntScheme, QuantizedTensor

W8A8 = FIXED_SCHEMES["W8A8"]


def made(dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    assert isinstance(W8A8, IntScheme)
    weight = torch.randn(24, 72, generator=torch.Generator().manual_seed(0))
    return quantize(weight, min_max_grid(weight, W8A8, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_package_reads_integers(dtype: torch.dtype) -> None:
    quantized = made(dtype)
    stored = layouts.pack(quantized)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in stored.items()} == {
        "weight": (torch.int8, (24, 72)),
        "weight_scale": (dtype, (24, 1)),
    }
    weights = QuantizationArgs(num_bits=8, type="int", strategy="channel", symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format="int-quantized")
    package = BaseCompressor.get_value_from_registry("int-quantized")
    wide = {**stored, "weight_scale": stored["weight_scale"].float()}
    assert torch.equal(package.decompress(wide, scheme)["weight"], quantized.dequantize())
    again = layouts.unpack(stored, W8A8)
    assert torch.equal(again.codes, quantized.codes)
    assert torch.equal(again.scale, quantized.scale)


def test_the_scale_of_static_inputs_is_stored_beside() -> None:
    scale = torch.tensor([0.5])
    assert layouts.pack(made(), scale)["input_scale"] is scale
    assert "input_scale" not in layouts.pack(made())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight": None}, "lacks 'weight'"),
        ({"weight_scale": None}, "lacks 'weight_scale'"),
        ({"weight": torch.zeros(24, 72)}, "torch.int8"),
        ({"weight": torch.zeros(24, 72).to(torch.float8_e4m3fn)}, "torch.int8"),
        ({"weight_scale": torch.ones(24, 2)}, r"the scheme needs \(24, 1\)"),
        ({"weight_scale": torch.ones(24, 1, dtype=torch.int32)}, "weight_scale is torch.int32"),
    ],
)
def test_contradictions_are_refused(change: dict[str, Any], said: str) -> None:
    stored = {name: t for name, t in {**layouts.pack(made()), **change}.items() if t is not None}
    with pytest.raises(IntegrityError, match=said):
        layouts.unpack(stored, W8A8)


def test_what_counts_as_a_quantised_linear() -> None:
    names = ["a.weight_packed", "a.weight_scale", "b.weight", "b.weight_scale", "c.weight", "d.weight_scale"]
    assert layouts.quantized_linears(dict.fromkeys(names)) == ["a", "b"]

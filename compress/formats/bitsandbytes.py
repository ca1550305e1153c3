"""NF4 weights as bitsandbytes stores them, and transformers with it loads them: scales quantised too.

weight (out * in / 2, 1) uint8, two codes to a byte along rows, the first in the high half; weight.absmax (groups of the
matrix,) uint8, codes of scales; weight.quant_map (16,) and weight.nested_quant_map (256,) float32, what codes stand
for; weight.nested_absmax float32, a range for every 256 scales; weight.quant_state.bitsandbytes__nf4, the rest as JSON
in bytes: shape, dtype, and the number that all scales have in common.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.errors import IntegrityError
from compress.formats.names import Refusal
from compress.formats.tensors import HINT, Layout, fetch
from compress.types import NF4, SCALES_PER_RANGE, NestedScales, NormalFloatScheme, QuantizedTensor, Scheme

QUANT_METHOD = "bitsandbytes"
SCALE, RANGES, STATE = "weight.absmax", "weight.nested_absmax", "weight.quant_state.bitsandbytes__nf4"
CODES, SCALE_CODES = "weight.quant_map", "weight.nested_quant_map"
PARTS = ("weight", SCALE, RANGES, CODES, SCALE_CODES, STATE)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_TABLE = 256


def layout(scheme: Scheme, out: int, width: int) -> Layout:
    """Shape and dtype of everything that a linear stores but its JSON, whose length depends on what it says."""
    scales = out * _nf4(scheme).groups(width)
    return {
        "weight": ((out * width // 2, 1), torch.uint8),
        SCALE: ((scales,), torch.uint8),
        RANGES: ((-(-scales // SCALES_PER_RANGE),), torch.float32),
        CODES: ((len(NF4),), torch.float32),
        SCALE_CODES: ((_TABLE,), torch.float32),
    }


def pack(quantized: QuantizedTensor) -> dict[str, Tensor]:
    """The stored tensors of one linear, by local name."""
    nested, codes = quantized.nested, quantized.codes.flatten()
    assert nested is not None
    return {
        "weight": ((codes[::2] << 4) | codes[1::2]).unsqueeze(1),
        SCALE: quantized.scale.flatten(),
        RANGES: nested.ranges,
        CODES: torch.tensor(NF4),
        SCALE_CODES: nested.table.clone(),
        STATE: _spelled(quantized, nested),
    }


def unpack(stored: Mapping[str, Tensor], scheme: Scheme) -> QuantizedTensor:
    """Inverse of `pack`.

    Raises:
        IntegrityError: a tensor is missing, its shape or dtype contradicts what the JSON says, or codes stand for other
            numbers than those of NF4.
    """
    nf4, said = _nf4(scheme), _read(fetch(stored, STATE, 1, dtype=torch.uint8))
    out, width = said["shape"]
    if not nf4.fits(width):
        raise IntegrityError(f"blocks of {nf4.group_size} do not divide the width {width}", HINT)
    rules = layout(nf4, out, width)
    packed, scale, ranges, codes, table = (fetch(stored, name, len(rule[0]), *rule) for name, rule in rules.items())
    if not torch.equal(codes, torch.tensor(NF4)):
        raise IntegrityError(f"{CODES} is not the table of NF4", HINT)
    index = torch.stack([packed >> 4, packed & 15], dim=-1).reshape(out, width)
    nested = NestedScales(table, ranges, torch.tensor([said["nested_offset"]]), _DTYPES[said["dtype"]])
    return QuantizedTensor(index, scale.reshape(out, -1), None, nf4, nested=nested)


def scales(stored: Mapping[str, Tensor]) -> Tensor:
    """The scales of a linear as numbers (out, groups)."""
    quantized = unpack(stored, NormalFloatScheme())
    assert quantized.nested is not None
    return quantized.nested.decode(quantized.scale)


def _spelled(quantized: QuantizedTensor, nested: NestedScales) -> Tensor:
    said = {
        "quant_type": "nf4",
        "blocksize": _nf4(quantized.scheme).group_size,
        "dtype": str(nested.dtype).removeprefix("torch."),
        "shape": list(quantized.codes.shape),
        "nested_blocksize": SCALES_PER_RANGE,
        "nested_dtype": "float32",
        "nested_offset": float(nested.middle),
    }
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def _read(state: Tensor) -> dict[str, Any]:
    """What the JSON says, all of it looked at."""
    try:
        said = json.loads(bytes(state.tolist()))
        layout = (said["quant_type"], said["blocksize"], said["nested_blocksize"], said["nested_dtype"])
        out, width = said["shape"]
        known = layout == ("nf4", NormalFloatScheme.group_size, SCALES_PER_RANGE, "float32")
        known &= isinstance(out, int) and isinstance(width, int) and out > 0 and width > 0
        if known and said["dtype"] in _DTYPES:
            return {**said, "nested_offset": float(said["nested_offset"])}
    except (ValueError, KeyError, TypeError):
        pass
    raise IntegrityError(f"{STATE} does not describe NF4 in blocks of 64 with quantised scales", HINT)


def quantization_config(schemes: Mapping[str, Scheme], ignored: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint. It computes in bfloat16, as QLoRA does."""
    return {
        "quant_method": QUANT_METHOD,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": sorted(ignored),
    }


def config_refusal(schemes: Mapping[str, Scheme], ignored: Iterable[str]) -> Refusal | None:
    """Why one config cannot say all this: what is left out is matched by parts of names."""
    for name in ignored:
        if hit := next((linear for linear in schemes if name in linear), None):
            said = f"bitsandbytes would leave out {hit} with {name}, because engines match parts of names"
            return Refusal(said, "leave both out with --ignore, or neither")
    return None


def schemes(quantization: Mapping[str, Any], linears: Sequence[str]) -> dict[str, Scheme]:
    """The scheme of each of `linears`. IntegrityError where the config is not of NF4 with quantised scales."""
    kind, double = quantization.get("bnb_4bit_quant_type"), quantization.get("bnb_4bit_use_double_quant")
    storage = quantization.get("bnb_4bit_quant_storage", "uint8")
    if not quantization.get("load_in_4bit") or (kind, bool(double), storage) != ("nf4", True, "uint8"):
        said = f"bitsandbytes with type {kind!r}, double quantisation {double!r} and storage {storage!r}"
        raise IntegrityError(f"{said} cannot be read here", "4 bits of type nf4 with double quantisation are read")
    return dict.fromkeys(linears, NormalFloatScheme())


def _nf4(scheme: Scheme) -> NormalFloatScheme:
    assert isinstance(scheme, NormalFloatScheme)
    return scheme

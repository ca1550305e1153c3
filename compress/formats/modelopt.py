"""FP8 weights as NVIDIA ModelOpt's unified checkpoints store them: codes as they are, every scale in float32.

weight (out, in) float8_e4m3fn; weight_scale () per tensor, (out,) per channel, (out / 128, 1, in / 128, 1) per tile;
input_scale () where inputs are static. The layout is said twice: in config.json, and in hf_quant_config.json as
TensorRT-LLM reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.errors import IntegrityError
from compress.formats.fp8 import E4M3
from compress.formats.names import CONFIG_FILES, Refusal
from compress.formats.tensors import Layout, fetch
from compress.types import FP8_TILE, Fp8Scheme, InputScheme, QuantizedTensor, Scheme

QUANT_METHOD = "modelopt"
(CONFIG_FILE,) = CONFIG_FILES
SCALE_DTYPE = torch.float32
PARTS = ("weight", "weight_scale", "input_scale")
# Engines know the layout by its producer's name; the version is the one whose files this module was checked against.
PRODUCER = {"name": "modelopt", "version": "0.47.0"}
ALGORITHMS: dict[str, Fp8Scheme] = {
    "FP8": Fp8Scheme("tensor", InputScheme("float", "tensor")),
    "FP8_PER_CHANNEL_PER_TOKEN": Fp8Scheme("channel", InputScheme("float", "token")),
    "FP8_PB_WO": Fp8Scheme("tile", InputScheme("float", "group", FP8_TILE)),
}
"""Scheme by `quant_algo`. Of the last, engines round inputs as they come, though its name speaks of weights only."""


def shape_refusal(scheme: Scheme, out: int, width: int) -> Refusal | None:
    """Why a weight (out, in) cannot be stored; None if it can."""
    if _fp8(scheme).granularity == "tile" and (out % FP8_TILE or width % FP8_TILE):
        said = f"modelopt has whole tiles of {FP8_TILE} x {FP8_TILE}, which do not divide {out} x {width}"
        return Refusal(said, "use compressed-tensors, or FP8_DYNAMIC")
    return None


def layout(scheme: Scheme, out: int, width: int) -> Layout:
    """Shape and dtype of everything that a linear stores."""
    fp8 = _fp8(scheme)
    shape = {"tensor": (), "channel": (out,), "tile": (-(-out // FP8_TILE), 1, -(-width // FP8_TILE), 1)}[
        fp8.granularity
    ]
    static: Layout = {} if fp8.inputs.dynamic else {"input_scale": ((), SCALE_DTYPE)}
    return {"weight": ((out, width), E4M3), "weight_scale": (shape, SCALE_DTYPE), **static}


def pack(quantized: QuantizedTensor, input_scale: Tensor | None) -> dict[str, Tensor]:
    """The stored tensors of one linear, by local name."""
    out, width = quantized.codes.shape
    shape, dtype = layout(quantized.scheme, out, width)["weight_scale"]
    stored = {"weight": quantized.codes.contiguous(), "weight_scale": quantized.scale.to(dtype).reshape(shape)}
    return stored if input_scale is None else {**stored, "input_scale": input_scale.to(dtype).reshape(())}


def unpack(stored: Mapping[str, Tensor], scheme: Scheme) -> QuantizedTensor:
    """Inverse of `pack`.

    Raises:
        IntegrityError: a tensor is missing, or its shape or dtype contradicts the scheme.
    """
    fp8 = _fp8(scheme)
    codes = fetch(stored, "weight", 2)
    out, width = codes.shape
    rules = layout(fp8, out, width)
    codes = fetch(stored, "weight", 2, *rules["weight"])
    shape, dtype = rules["weight_scale"]
    scale = fetch(stored, "weight_scale", len(shape), shape, dtype)
    return QuantizedTensor(codes, scale.reshape(fp8.scale_shape(out, width)), None, fp8)


def quantization_config(schemes: Mapping[str, Scheme], ignored: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` in config.json; `config_refusal` has none for these schemes."""
    (scheme,) = set(schemes.values())
    algorithm = next(name for name, known in ALGORITHMS.items() if known == scheme)
    groups = {}
    if algorithm == "FP8":  # of the others ModelOpt writes no group
        kind = {"dynamic": False, "num_bits": 8, "type": "float"}
        groups = {"config_groups": {"group_0": {"input_activations": kind, "weights": kind, "targets": ["Linear"]}}}
    return {
        **groups,
        "ignore": sorted(ignored),
        "quant_algo": algorithm,
        "producer": PRODUCER,
        "quant_method": QUANT_METHOD,
    }


def config_file(quantization: Mapping[str, Any]) -> bytes:
    """hf_quant_config.json, from what `quantization_config` made."""
    document = {
        "producer": quantization["producer"],
        "quantization": {
            "quant_algo": quantization["quant_algo"],
            "kv_cache_quant_algo": None,
            "exclude_modules": quantization["ignore"],
        },
    }
    return (json.dumps(document, indent=4) + "\n").encode()


def config_refusal(schemes: Mapping[str, Scheme], ignored: Iterable[str]) -> Refusal | None:
    """Why one config cannot say all this: one scheme for all, and what is left out is matched by parts of names."""
    if len(set(schemes.values())) > 1:
        said = " and ".join(sorted({scheme.name for scheme in schemes.values()}))
        return Refusal(f"modelopt is written with one scheme, and these linears have {said}", "use compressed-tensors")
    for name in ignored:
        if hit := next((linear for linear in schemes if name in linear), None):
            said = f"engines would leave out {hit} with {name}, because they match parts of names"
            return Refusal(said, "use compressed-tensors")
    return None


def schemes(quantization: Mapping[str, Any], linears: Sequence[str]) -> dict[str, Scheme]:
    """The scheme of each of `linears`. IntegrityError for an algorithm that is not read here."""
    algorithm = str(quantization.get("quant_algo")).upper()
    if algorithm not in ALGORITHMS:
        raise IntegrityError(f"modelopt's {algorithm} cannot be read here", f"{', '.join(ALGORITHMS)} are read")
    return dict.fromkeys(linears, ALGORITHMS[algorithm])


def _fp8(scheme: Scheme) -> Fp8Scheme:
    assert isinstance(scheme, Fp8Scheme)
    return scheme

"""FP8 and NVFP4 weights as NVIDIA ModelOpt's unified checkpoints store them.

FP8: weight (out, in) float8_e4m3fn; weight_scale float32, () per tensor, (out,) per channel, (out / 128, 1, in / 128,
1) per tile; input_scale () float32 where inputs are static. NVFP4: weight (out, in / 2) uint8, weight_scale (out, in /
16) float8_e4m3fn, and what multiplies all scales of a matrix: weight_scale_2 (), and input_scale () of inputs, float32.
They are the reciprocals of what compressed-tensors divides by. The layout is said twice: in config.json, and in
hf_quant_config.json as TensorRT-LLM reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.errors import IntegrityError, UserError
from compress.formats import fp4
from compress.formats.fp8 import E4M3
from compress.formats.names import CONFIG_FILES, Refusal
from compress.formats.tensors import HINT, Layout, fetch, positive
from compress.types import E2M1, FP8_TILE, BlockFloatScheme, Fp8Scheme, InputScheme, QuantizedTensor, Scheme

QUANT_METHOD = "modelopt"
(CONFIG_FILE,) = CONFIG_FILES
SCALE_DTYPE = torch.float32
PARTS = ("weight", "weight_scale", "weight_scale_2", "input_scale")
# Engines know the layout by its producer's name; the version is the one whose files this module was checked against.
PRODUCER = {"name": "modelopt", "version": "0.47.0"}
ALGORITHMS: dict[str, Fp8Scheme | BlockFloatScheme] = {
    "FP8": Fp8Scheme("tensor", InputScheme("float", "tensor")),
    "FP8_PER_CHANNEL_PER_TOKEN": Fp8Scheme("channel", InputScheme("float", "token")),
    "FP8_PB_WO": Fp8Scheme("tile", InputScheme("float", "group", FP8_TILE)),
    "NVFP4": BlockFloatScheme(4, "e4m3", InputScheme("float", "group", 16, 4, "e4m3")),
    "W4A16_NVFP4": BlockFloatScheme(4, "e4m3"),
}
"""Scheme by `quant_algo`. Of FP8_PB_WO engines round inputs as they come, though its name speaks of weights only."""


def shape_refusal(scheme: Scheme, out: int, width: int) -> Refusal | None:
    """Why a weight (out, in) cannot be stored; None if it can."""
    if isinstance(scheme, Fp8Scheme) and scheme.granularity == "tile" and (out % FP8_TILE or width % FP8_TILE):
        said = f"modelopt has whole tiles of {FP8_TILE} x {FP8_TILE}, which do not divide {out} x {width}"
        return Refusal(said, "use compressed-tensors, or FP8_DYNAMIC")
    return None


def layout(scheme: Scheme, out: int, width: int) -> Layout:
    """Shape and dtype of everything that a linear stores."""
    if isinstance(scheme, BlockFloatScheme):
        inputs: Layout = {} if scheme.inputs is None else {"input_scale": ((), SCALE_DTYPE)}
        weight: Layout = {
            "weight": ((out, width // 2), torch.uint8),
            "weight_scale": ((out, scheme.groups(width)), E4M3),
        }
        return {**weight, "weight_scale_2": ((), SCALE_DTYPE), **inputs}
    fp8 = _fp8(scheme)
    shape = {"tensor": (), "channel": (out,), "tile": (-(-out // FP8_TILE), 1, -(-width // FP8_TILE), 1)}[
        fp8.granularity
    ]
    static: Layout = {} if fp8.inputs.dynamic else {"input_scale": ((), SCALE_DTYPE)}
    return {"weight": ((out, width), E4M3), "weight_scale": (shape, SCALE_DTYPE), **static}


def pack(quantized: QuantizedTensor, input_scale: Tensor | None) -> dict[str, Tensor]:
    """The stored tensors of one linear, by local name; `value_refusal` has none for it."""
    if isinstance(quantized.scheme, BlockFloatScheme):
        assert quantized.divisor is not None
        weight = {"weight": fp4.pack(quantized.codes), "weight_scale": quantized.scale.contiguous()}
        stored = {**weight, "weight_scale_2": quantized.divisor.reciprocal().reshape(())}
        return (
            stored if input_scale is None else {**stored, "input_scale": input_scale.float().reciprocal().reshape(())}
        )
    out, width = quantized.codes.shape
    shape, dtype = layout(quantized.scheme, out, width)["weight_scale"]
    stored = {"weight": quantized.codes.contiguous(), "weight_scale": quantized.scale.to(dtype).reshape(shape)}
    return stored if input_scale is None else {**stored, "input_scale": input_scale.to(dtype).reshape(())}


def unpack(stored: Mapping[str, Tensor], scheme: Scheme) -> QuantizedTensor:
    """Inverse of `pack`.

    Raises:
        IntegrityError: a tensor is missing, or its shape or dtype contradicts the scheme.
        UserError: NVFP4 whose matrix has a factor that no float32 is the reciprocal of, which only `decode` reads.
    """
    if isinstance(scheme, BlockFloatScheme):
        codes, scale, factor = nvfp4(stored, scheme)
        if not _inverts(factor):
            said = (
                f"weight_scale_2 is {float(factor):g}, which is no power of two: other formats divide by its reciprocal"
            )
            raise UserError(said, "`compress export --to dense` writes its numbers")
        return QuantizedTensor(codes, scale, None, scheme, factor.reciprocal().reshape(1))
    fp8 = _fp8(scheme)
    codes = fetch(stored, "weight", 2)
    out, width = codes.shape
    rules = layout(fp8, out, width)
    codes = fetch(stored, "weight", 2, *rules["weight"])
    shape, dtype = rules["weight_scale"]
    scale = fetch(stored, "weight_scale", len(shape), shape, dtype)
    return QuantizedTensor(codes, scale.reshape(fp8.scale_shape(out, width)), None, fp8)


def decode(stored: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """The weight (out, in): of FP8 float32, of NVFP4 bfloat16, as ModelOpt decodes it."""
    if not isinstance(scheme, BlockFloatScheme):
        return unpack(stored, scheme).dequantize()
    codes, scale, factor = nvfp4(stored, scheme)
    levels = torch.tensor(E2M1)
    values = torch.cat([levels, -levels])[codes.int()].unflatten(1, (scale.shape[1], -1))
    return (values * (scale.float() * factor).unsqueeze(-1)).flatten(1).bfloat16()


def input_scale(stored: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """What the scheme's static inputs are rounded with (1,). IntegrityError where it is not stored."""
    scale = positive(stored, "input_scale").float().reshape(1)
    return scale.reciprocal() if isinstance(scheme, BlockFloatScheme) else scale


def value_refusal(quantized: QuantizedTensor) -> Refusal | None:
    """Why the divisor of a matrix cannot be stored as its reciprocal; None if it can, as all that are made here can."""
    if quantized.divisor is None or _inverts(quantized.divisor):
        return None
    said = f"modelopt multiplies by the reciprocal of {float(quantized.divisor):g}, which float32 does not hold exactly"
    return Refusal(said, "quantise with --format modelopt")


def nvfp4(stored: Mapping[str, Tensor], scheme: BlockFloatScheme) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (out, in), scales (out, groups), and the factor () of them all.

    Raises:
        IntegrityError: as `unpack`.
    """
    out, half = fetch(stored, "weight", 2, dtype=torch.uint8).shape
    if not scheme.fits(2 * half):
        raise IntegrityError(f"weight holds {2 * half} inputs, which blocks of {scheme.group_size} do not divide", HINT)
    rules = layout(scheme, out, 2 * half)
    scale = fetch(stored, "weight_scale", 2, *rules["weight_scale"])
    fetch(stored, "weight_scale_2", 0, *rules["weight_scale_2"])
    return fp4.unpack(stored["weight"]), scale, positive(stored, "weight_scale_2")


def _inverts(number: Tensor) -> bool:
    """Whether the reciprocal is exact: of powers of two."""
    return float(torch.frexp(number.float()).mantissa) == 0.5


def quantization_config(schemes: Mapping[str, Scheme], ignored: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` in config.json; `config_refusal` has none for these schemes."""
    (scheme,) = set(schemes.values())
    algorithm = next(name for name, known in ALGORITHMS.items() if known == scheme)
    groups = {}
    if algorithm not in ("FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO"):  # of these ModelOpt writes no group
        size = {} if scheme.group_size is None else {"group_size": scheme.group_size}
        kind = {"dynamic": False, "num_bits": scheme.bits, "type": "float", **size}
        inputs = {} if scheme.inputs is None else {"input_activations": kind}
        groups = {"config_groups": {"group_0": {**inputs, "weights": kind, "targets": ["Linear"]}}}
    return {
        **groups,
        "ignore": sorted(ignored),
        "quant_algo": algorithm,
        "producer": PRODUCER,
        "quant_method": QUANT_METHOD,
    }


def config_file(quantization: Mapping[str, Any]) -> bytes:
    """hf_quant_config.json, from what `quantization_config` made."""
    size = ALGORITHMS[quantization["quant_algo"]].group_size
    document = {
        "producer": quantization["producer"],
        "quantization": {
            "quant_algo": quantization["quant_algo"],
            "kv_cache_quant_algo": None,
            **({} if size is None else {"group_size": size}),
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

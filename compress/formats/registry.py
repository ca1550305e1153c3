"""The formats of whole checkpoints in one table: how a config names them, how their linears are packed and read.

Everything that writes or reads quantised weights asks here, so that a format costs one file and one entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compress.errors import IntegrityError
from compress.formats import awq, bitnet, bitsandbytes, compressed_tensors, gptq, layouts, modelopt
from compress.formats.names import FormatName, Refusal
from compress.formats.tensors import Layout
from compress.types import QuantizedTensor, Scheme

Schemes = Mapping[str, Scheme]


def _fits(scheme: Scheme, out: int, width: int) -> Refusal | None:
    return None


def _any_values(quantized: QuantizedTensor) -> Refusal | None:
    return None


def _any_config(schemes: Schemes, ignored: Iterable[str]) -> Refusal | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One format. What it cannot carry is said by the refusals; `pack` and `config` are not called where one is given.

    marker: suffix of a stored name that only a quantised linear has. parts: local names of all that it stores.
    scale_dtype: what scales are stored in; None: the dtype of the weight they replace.
    files: what stands beside config.json, by name, from the quantisation part of the config.
    ignored: linears that a config leaves out by name; of candidates where it names them by patterns.
    input_scale: what the scheme's static inputs are rounded with (1,), of stored tensors.
    scales: those of a linear as numbers, of stored tensors.
    experts: whether loaders of the format know experts of a mixture, which models keep fused. biases: whether they add
    the bias of a linear as it is stored.
    """

    name: FormatName
    marker: str
    parts: tuple[str, ...]
    scale_dtype: torch.dtype | None
    pack: Callable[[QuantizedTensor, Tensor | None], dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Tensor], Scheme], QuantizedTensor]
    config: Callable[[Schemes, Iterable[str]], dict[str, Any]]
    schemes: Callable[[Mapping[str, Any], Sequence[str]], dict[str, Scheme]]
    layout: Callable[[Scheme, int, int], Layout] | None = None
    decode: Callable[[Mapping[str, Tensor], Scheme], Tensor] | None = None
    shape_refusal: Callable[[Scheme, int, int], Refusal | None] = _fits
    value_refusal: Callable[[QuantizedTensor], Refusal | None] = _any_values
    config_refusal: Callable[[Schemes, Iterable[str]], Refusal | None] = _any_config
    files: dict[str, Callable[[Mapping[str, Any]], bytes]] = field(default_factory=dict)
    experts: bool = True
    biases: bool = True
    ignored: Callable[[Mapping[str, Any], Sequence[str]], list[str]]
    input_scale: Callable[[Mapping[str, Tensor], Scheme], Tensor] = layouts.input_scale
    scales: Callable[[Mapping[str, Tensor]], Tensor] = layouts.scales

    def linears(self, names: Mapping[str, object]) -> list[str]:
        """The linears among stored tensors (by name) that are quantised."""
        if self.name == "compressed-tensors":
            return layouts.quantized_linears(names)
        return [name.removesuffix(self.marker) for name in names if name.endswith(self.marker)]

    def stored_bits(self, scheme: Scheme, out: int, width: int, scale_dtype: torch.dtype) -> int:
        """Bits that a linear takes, as its scheme counts them, or this format where it stores more."""
        if self.layout is None:
            return round(scheme.bits_per_weight(width, 8 * scale_dtype.itemsize, out) * out * width)
        stored = self.layout(scheme, out, width).values()
        return sum(8 * math.prod(shape) * dtype.itemsize for shape, dtype in stored)

    def weight(self, stored: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
        """The weight (out, in) that a linear's stored tensors stand for.

        Raises:
            IntegrityError: they do not fit each other or the scheme.
        """
        return self.unpack(stored, scheme).dequantize() if self.decode is None else self.decode(stored, scheme)


def _listed(key: str) -> Callable[[Mapping[str, Any], Sequence[str]], list[str]]:
    """Names as a config lists them."""
    return lambda quantization, candidates: list(quantization.get(key) or [])


def _plain_scales(stored: Mapping[str, Tensor]) -> Tensor:
    return stored["scales"].float()


def _gptq(name: FormatName, version: gptq.Version) -> Format:
    return Format(
        name=name,
        marker=".qweight",
        parts=gptq.PARTS,
        scale_dtype=gptq.SCALE_DTYPE,
        pack=lambda quantized, _: gptq.pack(quantized, version),
        unpack=partial(gptq.unpack, version=version),
        decode=partial(gptq.decode, version=version),
        config=partial(gptq.quantization_config, version=version),
        schemes=gptq.schemes,
        layout=gptq.layout,
        shape_refusal=gptq.shape_refusal,
        value_refusal=partial(gptq.value_refusal, version=version),
        ignored=gptq.ignored,
        scales=_plain_scales,
    )


FORMATS: dict[FormatName, Format] = {
    format.name: format
    for format in (
        Format(
            name="compressed-tensors",
            marker=layouts.SCALE_SUFFIX,
            parts=layouts.PARTS,
            scale_dtype=None,
            pack=layouts.pack,
            unpack=layouts.unpack,
            config=compressed_tensors.quantization_config,
            schemes=compressed_tensors.schemes_from_config,
            ignored=_listed("ignore"),
        ),
        Format(
            name="awq",
            marker=".qweight",
            parts=awq.PARTS,
            scale_dtype=awq.SCALE_DTYPE,
            pack=lambda quantized, _: awq.pack(quantized),
            unpack=awq.unpack,
            config=awq.quantization_config,
            schemes=awq.schemes,
            layout=awq.layout,
            shape_refusal=awq.shape_refusal,
            config_refusal=awq.config_refusal,
            ignored=_listed("modules_to_not_convert"),
            scales=_plain_scales,
        ),
        _gptq("gptq", 1),
        _gptq("gptq-v2", 2),
        Format(
            name="modelopt",
            marker=layouts.SCALE_SUFFIX,
            parts=modelopt.PARTS,
            scale_dtype=modelopt.SCALE_DTYPE,
            pack=modelopt.pack,
            unpack=modelopt.unpack,
            config=modelopt.quantization_config,
            schemes=modelopt.schemes,
            layout=modelopt.layout,
            shape_refusal=modelopt.shape_refusal,
            config_refusal=modelopt.config_refusal,
            value_refusal=modelopt.value_refusal,
            decode=modelopt.decode,
            input_scale=modelopt.input_scale,
            ignored=_listed("ignore"),
            files={modelopt.CONFIG_FILE: modelopt.config_file},
        ),
        Format(
            name="bitnet",
            marker=layouts.SCALE_SUFFIX,
            parts=bitnet.PARTS,
            scale_dtype=None,
            pack=lambda quantized, _: bitnet.pack(quantized),
            unpack=bitnet.unpack,
            config=bitnet.quantization_config,
            schemes=bitnet.schemes,
            shape_refusal=bitnet.shape_refusal,
            value_refusal=bitnet.value_refusal,
            ignored=_listed("modules_to_not_convert"),
            experts=False,
            biases=False,
        ),
        Format(
            name="bitsandbytes",
            marker=f".{bitsandbytes.SCALE}",
            parts=bitsandbytes.PARTS,
            scale_dtype=None,
            pack=lambda quantized, _: bitsandbytes.pack(quantized),
            unpack=bitsandbytes.unpack,
            config=bitsandbytes.quantization_config,
            schemes=bitsandbytes.schemes,
            layout=bitsandbytes.layout,
            config_refusal=bitsandbytes.config_refusal,
            ignored=_listed("llm_int8_skip_modules"),
            scales=bitsandbytes.scales,
            experts=False,
        ),
    )
}


def format_of(quantization: Mapping[str, Any]) -> Format | None:
    """The format that a `quantization_config` names; None for one that is not in the table."""
    if compressed_tensors.is_for_own_reader(quantization):
        return FORMATS["compressed-tensors"]
    method = quantization.get("quant_method")
    if method == gptq.QUANT_METHOD:
        version = gptq.version_of(quantization)
        return None if version is None else FORMATS["gptq" if version == 1 else "gptq-v2"]
    names: dict[Any, FormatName] = {
        "compressed-tensors": "compressed-tensors",
        awq.QUANT_METHOD: "awq",
        modelopt.QUANT_METHOD: "modelopt",
        bitsandbytes.QUANT_METHOD: "bitsandbytes",
        bitnet.QUANT_METHOD: "bitnet",
    }
    return FORMATS[names[method]] if isinstance(method, str) and method in names else None


def schemes_of(quantization: Mapping[str, Any], names: Mapping[str, object]) -> tuple[Format, dict[str, Scheme]]:
    """The format of a checkpoint and the scheme of each of its quantised linears; `names` are its stored tensors.

    Raises:
        IntegrityError: a format or a scheme that is not read here, or a quantised linear that the config does not
            describe.
    """
    found = format_of(quantization)
    if found is None:
        method = quantization.get("quant_method")
        raise IntegrityError(f"quantisation {method!r} cannot be read here", "use an artifact written by this version")
    linears = found.linears(names)
    schemes = found.schemes(quantization, linears)
    if unknown := [name for name in linears if name not in schemes]:
        raise IntegrityError(
            f"{unknown[0]} is packed, but no group of quantization_config describes it",
            "config.json and the weights do not belong together: run `compress verify`",
        )
    return found, schemes

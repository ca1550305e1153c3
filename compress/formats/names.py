"""The checkpoint formats by name, and which of them carries which scheme. Free of torch: recipes are checked by it.

What depends on a linear's shape or on its values is asked of the format itself (`registry.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from compress.types import BlockFloatScheme, Fp8Scheme, IntScheme, NormalFloatScheme, Scheme, ternary_scheme

FormatName = Literal["compressed-tensors", "awq", "gptq", "gptq-v2", "modelopt", "bitsandbytes", "bitnet"]
FORMATS: tuple[FormatName, ...] = get_args(FormatName)
GPTQ_BITS = (2, 3, 4, 8)
CONFIG_FILES = ("hf_quant_config.json",)
"""What formats keep beside config.json."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a format does not carry something, and what to do instead."""

    reason: str
    hint: str


def refusal(name: FormatName, scheme: Scheme) -> Refusal | None:
    """Why the format cannot carry this scheme, whatever the shapes; None if it can."""
    return _REFUSALS[name](scheme)


def usual(scheme: Scheme) -> FormatName:
    """The format that is meant where none is named."""
    if isinstance(scheme, NormalFloatScheme):
        return "bitsandbytes"
    return "bitnet" if scheme == ternary_scheme() else "compressed-tensors"


def _compressed_tensors(scheme: Scheme) -> Refusal | None:
    if isinstance(scheme, NormalFloatScheme):
        return Refusal(f"compressed-tensors has no layout for {scheme.name}", "use bitsandbytes, or leave `format` out")
    if scheme == ternary_scheme():
        return Refusal(f"compressed-tensors has no layout for {scheme.name}", "use bitnet, or W2A16")
    return None


def _bitnet(scheme: Scheme) -> Refusal | None:
    if scheme == ternary_scheme():
        return None
    return Refusal(f"bitnet is written for W2A8, not for {scheme.name}", "use --method ternary --scheme W2A8")


def _bitsandbytes(scheme: Scheme) -> Refusal | None:
    if isinstance(scheme, NormalFloatScheme):
        return None
    return Refusal(f"bitsandbytes is written for NF4, not for {scheme.name}", "leave `format` out")


def _awq(scheme: Scheme) -> Refusal | None:
    if not isinstance(scheme, IntScheme) or scheme.inputs is not None:
        return _weights_alone("awq", scheme)
    if scheme.bits != 4:
        return Refusal(f"awq holds 4-bit codes, and {scheme.name} has {scheme.bits}", "use gptq or compressed-tensors")
    return None


def _gptq_v2(scheme: Scheme) -> Refusal | None:
    if not isinstance(scheme, IntScheme) or scheme.inputs is not None:
        return _weights_alone("gptq", scheme)
    if scheme.bits not in GPTQ_BITS:
        bits = ", ".join(map(str, GPTQ_BITS))
        return Refusal(
            f"gptq holds codes of {bits} bits, and {scheme.name} has {scheme.bits}", "use compressed-tensors"
        )
    return None


def _modelopt(scheme: Scheme) -> Refusal | None:
    if isinstance(scheme, Fp8Scheme) or (isinstance(scheme, BlockFloatScheme) and scheme.scale_type == "e4m3"):
        return None
    said = f"modelopt is written for FP8 and NVFP4 schemes, not for {scheme.name}"
    return Refusal(said, "use compressed-tensors, awq or gptq")


def _weights_alone(name: str, scheme: Scheme) -> Refusal:
    return Refusal(f"{name} holds integer weights alone, and not {scheme.name}", "use compressed-tensors or modelopt")


_REFUSALS: dict[FormatName, Callable[[Scheme], Refusal | None]] = {
    "compressed-tensors": _compressed_tensors,
    "awq": _awq,
    "gptq": _gptq_v2,
    "gptq-v2": _gptq_v2,
    "modelopt": _modelopt,
    "bitsandbytes": _bitsandbytes,
    "bitnet": _bitnet,
}

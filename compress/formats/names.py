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


def refusal(name: FormatName, scheme: Scheme, instead_of: FormatName | None = None) -> Refusal | None:
    """Why the format cannot carry this scheme, whatever the shapes; None if it can.

    instead_of: a format that the weights are in already, which the hint then does not name.
    """
    reason = _REFUSALS[name](scheme)
    if reason is None:
        return None
    others = [other for other in FORMATS if other != instead_of and _REFUSALS[other](scheme) is None]
    return Refusal(reason, f"use {' or '.join(others)}" if others else "")


def usual(scheme: Scheme) -> FormatName:
    """The format that is meant where none is named."""
    if isinstance(scheme, NormalFloatScheme):
        return "bitsandbytes"
    return "bitnet" if scheme == ternary_scheme() else "compressed-tensors"


def _compressed_tensors(scheme: Scheme) -> str | None:
    if isinstance(scheme, NormalFloatScheme) or scheme == ternary_scheme():
        return f"compressed-tensors has no layout for {scheme.name}"
    return None


def _bitnet(scheme: Scheme) -> str | None:
    return None if scheme == ternary_scheme() else f"bitnet is written for W2A8, not for {scheme.name}"


def _bitsandbytes(scheme: Scheme) -> str | None:
    return None if isinstance(scheme, NormalFloatScheme) else f"bitsandbytes is written for NF4, not for {scheme.name}"


def _awq(scheme: Scheme) -> str | None:
    if not isinstance(scheme, IntScheme) or scheme.inputs is not None:
        return f"awq holds integer weights alone, and not {scheme.name}"
    return None if scheme.bits == 4 else f"awq holds 4-bit codes, and {scheme.name} has {scheme.bits}"


def _gptq_v2(scheme: Scheme) -> str | None:
    if not isinstance(scheme, IntScheme) or scheme.inputs is not None:
        return f"gptq holds integer weights alone, and not {scheme.name}"
    if scheme.bits in GPTQ_BITS:
        return None
    return f"gptq holds codes of {', '.join(map(str, GPTQ_BITS))} bits, and {scheme.name} has {scheme.bits}"


def _modelopt(scheme: Scheme) -> str | None:
    if isinstance(scheme, Fp8Scheme) or (isinstance(scheme, BlockFloatScheme) and scheme.scale_type == "e4m3"):
        return None
    return f"modelopt is written for FP8 and NVFP4 schemes, not for {scheme.name}"


_REFUSALS: dict[FormatName, Callable[[Scheme], str | None]] = {
    "compressed-tensors": _compressed_tensors,
    "awq": _awq,
    "gptq": _gptq_v2,
    "gptq-v2": _gptq_v2,
    "modelopt": _modelopt,
    "bitsandbytes": _bitsandbytes,
    "bitnet": _bitnet,
}

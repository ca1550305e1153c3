"""Blocks of floats in a compressed-tensors `quantization_config`: the arguments of weights and inputs, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.types import BlockFloatScheme, InputScheme

NVFP4, MXFP4, MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"
FORMATS = {("e4m3", 4): NVFP4, ("e8m0", 4): MXFP4, ("e8m0", 8): MXFP8}
_STRATEGIES = {"e4m3": "tensor_group", "e8m0": "group"}
_SCALE_DTYPES = {"e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}


def arguments(kind: BlockFloatScheme | InputScheme, dynamic: bool | str) -> dict[str, Any]:
    """The arguments of weights (dynamic False) or of inputs."""
    return {
        "num_bits": kind.bits,
        "type": "float",
        "symmetric": True,
        "strategy": _STRATEGIES[kind.scale_type],
        "group_size": kind.group_size,
        "dynamic": dynamic,
        "scale_dtype": _SCALE_DTYPES[kind.scale_type],
        "zp_dtype": _SCALE_DTYPES[kind.scale_type],
    }


def input_arguments(inputs: InputScheme) -> dict[str, Any]:
    """Scales of NVFP4's inputs are found as tokens come, their divisor is stored: `local`."""
    return arguments(inputs, "local" if inputs.scale_type == "e4m3" else True)


def inputs_of(bits: int, scale_type: Any) -> InputScheme:
    """The inputs that weights of so many bits and such scales go with."""
    return InputScheme("float", "group", 16 if scale_type == "e4m3" else 32, bits, scale_type)


def scheme_of(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> BlockFloatScheme | None:
    """The scheme that these arguments describe; None if it is none of blocks of floats."""
    for scale_type, bits in FORMATS:
        alone = BlockFloatScheme(bits, scale_type)  # type: ignore[arg-type]
        if not _agree(weights, arguments(alone, False)):
            continue
        if not inputs:
            return alone
        rounded = inputs_of(bits, scale_type)
        if _agree(inputs, input_arguments(rounded)):
            return BlockFloatScheme(bits, scale_type, rounded)  # type: ignore[arg-type]
    return None


def _agree(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether all that decides the numbers is as wanted; what scales and zero points were made in does not."""
    decisive = {key: value for key, value in wanted.items() if key not in ("scale_dtype", "zp_dtype")}
    plain = {"symmetric": True, "dynamic": False, **found}
    return all(plain.get(key) == value for key, value in decisive.items())

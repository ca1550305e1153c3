"""The numeric layout of a checkpoint as one word, read from its config, so that a gate can choose its limits by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.errors import IntegrityError
from compress.formats.compressed_tensors import scheme_of_group
from compress.formats.registry import format_of

DENSE = "dense"


def scheme_of(config: Mapping[str, Any]) -> str:
    """`w4a16-g128`, `w8a8`, `fp8-dynamic`, `w4a16-g128-asym`; joined by `+` where linears differ; `dense` without any.

    A group that this version does not read is spelled out, as in `w8a8-channel-asym`.

    AWQ, GPTQ and ModelOpt describe one layout for all linears (GPTQ's exceptions are not looked at). A quantisation
    that is not read here is named by its method.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping) or not quantization:
        return DENSE
    groups = quantization.get("config_groups")
    found = format_of(quantization)
    if found is not None and found.name != "compressed-tensors":
        try:
            return found.schemes(quantization, [""])[""].label
        except IntegrityError:
            return found.name
    if not isinstance(groups, Mapping):
        return str(quantization.get("quant_method") or "quantized")
    labels = {_label(group) for group in groups.values() if isinstance(group, Mapping)}
    return "+".join(sorted(labels)) or DENSE


def _label(group: Mapping[str, Any]) -> str:
    try:
        return scheme_of_group(group).label
    except (IntegrityError, KeyError):
        return _spelled_out(group)


def _spelled_out(group: Mapping[str, Any]) -> str:
    weights = group.get("weights") or {}
    inputs = group.get("input_activations") or {}
    size = weights.get("group_size")
    grouped = isinstance(size, int) and size > 0
    kind = "fp" if weights.get("type") == "float" else "w"
    label = f"{kind}{weights.get('num_bits')}a{inputs.get('num_bits', 16)}-" + (f"g{size}" if grouped else "channel")
    return label + ("" if weights.get("symmetric", True) else "-asym")

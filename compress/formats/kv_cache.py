"""A key and value cache in FP8 as compressed-tensors describes it: two scales per attention, one for all its heads.

`k_scale` and `v_scale` (1,) lie beside the linears of the attention; `kv_cache_scheme` in the config announces them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from compress.types import InputScheme

PARTS = ("k_scale", "v_scale")
ROUNDING = InputScheme("float", "tensor")
SCHEME: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}


def is_described(quantization: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` says that the cache is rounded, in the way that is known here."""
    found = quantization.get("kv_cache_scheme")
    return isinstance(found, Mapping) and all(found.get(key) == value for key, value in SCHEME.items())


def attentions(names: Iterable[str]) -> list[str]:
    """The attentions of which stored tensors, by name, hold a scale."""
    found = (name.rpartition(".") for name in names)
    return sorted({attention for attention, _, part in found if part in PARTS})

"""The `quantization_config` of a compressed-tensors checkpoint, written and read.

A single scheme targets the class `Linear`; several target exact module names, one regex each, because class-name
targets are refused or misread by some engines once there are several groups. Fused experts go by their on-disk names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from compress.errors import IntegrityError
from compress.types import IntScheme

FORMAT = "pack-quantized"
OWN_READER = "compress"


def quantization_config(schemes: Mapping[str, IntScheme], ignored: Iterable[str]) -> dict[str, Any]:
    """Builds the config for linears with their schemes; `ignored` are the linears that stay in high precision.

    One scheme for everything targets the class `Linear` (what every engine reads); several schemes get one group each
    with explicit name patterns.
    """
    groups: dict[IntScheme, list[str]] = {}
    for name in sorted(schemes):
        groups.setdefault(schemes[name], []).append(name)
    single = len(groups) == 1
    # transformers makes room for unpacked zero points where it keeps weights packed, and then refuses the packed ones.
    loading = {} if all(scheme.symmetric for scheme in groups) else {"dequantize": True}
    return {
        **loading,
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": sorted(ignored),
        "config_groups": {
            f"group_{i}": {
                "targets": ["Linear"] if single else [f"re:^{re.escape(name)}$" for name in names],
                "weights": _weight_args(scheme),
                "input_activations": None,
                "output_activations": None,
                "format": FORMAT,
            }
            for i, (scheme, names) in enumerate(groups.items())
        },
    }


def for_own_reader(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """The same packed tensors, marked as readable by our own reader only.

    transformers takes a `quant_method` that it does not know for no quantisation at all and fills the weights that it
    then misses with random numbers. It refuses a config that names none, as other engines do.
    """
    return {key: value for key, value in quantization.items() if key != "quant_method"} | {"reader": OWN_READER}


def is_for_own_reader(quantization: object) -> bool:
    """Whether a `quantization_config` was made by `for_own_reader`."""
    return isinstance(quantization, Mapping) and quantization.get("reader") == OWN_READER


def schemes_from_config(config: Mapping[str, Any], linears: Iterable[str]) -> dict[str, IntScheme]:
    """The scheme of each of `linears` (module names), those that stay in high precision left out.

    Raises:
        IntegrityError: the config holds a group that is not integer weight-only.
    """
    ignore = config.get("ignore") or []
    found: dict[str, IntScheme] = {}
    for name in linears:
        if any(_matches(target, name) for target in ignore):
            continue
        for group in config["config_groups"].values():
            if any(target == "Linear" or _matches(target, name) for target in group["targets"]):
                found[name] = _scheme(group["weights"])
                break
    return found


def _matches(target: str, name: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target == name


def _weight_args(scheme: IntScheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
        "actorder": None,
    }


def _scheme(args: Mapping[str, Any]) -> IntScheme:
    if args.get("type") != "int" or args.get("strategy") not in ("group", "channel"):
        raise IntegrityError(
            f"weights of type {args.get('type')!r} with strategy {args.get('strategy')!r} cannot be read here",
            "use an artifact written by this version",
        )
    return IntScheme(
        int(args["num_bits"]), args["group_size"] if args["strategy"] == "group" else None, bool(args["symmetric"])
    )

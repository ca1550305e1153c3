"""The `quantization_config` of a compressed-tensors checkpoint, written and read.

A single scheme targets the class `Linear`; several target exact module names, one regex each, because class-name
targets are refused or misread by some engines once there are several groups. Fused experts go by their on-disk names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from compress.errors import IntegrityError
from compress.formats import block_groups, kv_cache
from compress.types import FP8_TILE, BlockFloatScheme, Fp8Scheme, InputScheme, IntScheme, Scheme

PACKED = "pack-quantized"
INTEGERS = "int-quantized"
FLOATS = "float-quantized"
MIXED = "mixed-precision"
OWN_READER = "compress"
_FP8_GRANULARITIES: dict[Any, Literal["tensor", "channel", "tile"]] = {
    "tensor": "tensor",
    "channel": "channel",
    "block": "tile",
}


def format_of(scheme: Scheme) -> str:
    """The name of the layout that stores a scheme."""
    if isinstance(scheme, BlockFloatScheme):
        return block_groups.FORMATS[scheme.scale_type, scheme.bits]
    if isinstance(scheme, Fp8Scheme):
        return FLOATS
    return PACKED if scheme.inputs is None else INTEGERS


def quantization_config(
    schemes: Mapping[str, Scheme],
    ignored: Iterable[str],
    fp8_cache: bool = False,
    outside: Sequence[str] = (),
    dense_at_load: bool = False,
) -> dict[str, Any]:
    """Builds the config for linears with their schemes; `ignored` are the linears that stay in high precision.

    fp8_cache: whether scales of keys and values are stored too. outside: those of `schemes` that engines want named
    even where `Linear` is a target, the embedding and the head. dense_at_load: transformers keeps none of them packed.

    One scheme for everything targets the class `Linear` (what every engine reads); several schemes get one group each
    with explicit name patterns.
    """
    groups: dict[Scheme, list[str]] = {}
    for name in sorted(schemes):
        groups.setdefault(schemes[name], []).append(name)
    single = len(groups) == 1
    formats = sorted({format_of(scheme) for scheme in groups})
    # transformers makes room for unpacked zero points where it keeps weights packed, and then refuses the packed ones.
    # Of blocks of floats it makes bfloat16 weights whatever the model computes in, unless it dequantises them itself.
    alone = single and all(isinstance(scheme, BlockFloatScheme) and scheme.inputs is None for scheme in groups)
    loading = {"dequantize": True} if dense_at_load or alone or not all(scheme.symmetric for scheme in groups) else {}
    return {
        **loading,
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": {**kv_cache.SCHEME} if fp8_cache else None,
        "ignore": sorted(ignored),
        "config_groups": {
            f"group_{i}": {
                "targets": ["Linear", *_patterns(outside)] if single else _patterns(names),
                "weights": _weight_args(scheme),
                "input_activations": None if scheme.inputs is None else _input_args(scheme.inputs),
                "output_activations": None,
                "format": format_of(scheme),
            }
            for i, (scheme, names) in enumerate(groups.items())
        },
    }


def _patterns(names: Iterable[str]) -> list[str]:
    return [f"re:^{re.escape(name)}$" for name in names]


def for_own_reader(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """The same packed tensors, marked as readable by our own reader only.

    transformers takes a `quant_method` that it does not know for no quantisation at all and fills the weights that it
    then misses with random numbers. It refuses a config that names none, as other engines do.
    """
    return {key: value for key, value in quantization.items() if key != "quant_method"} | {"reader": OWN_READER}


def is_for_own_reader(quantization: object) -> bool:
    """Whether a `quantization_config` was made by `for_own_reader`."""
    return isinstance(quantization, Mapping) and quantization.get("reader") == OWN_READER


def schemes_from_config(config: Mapping[str, Any], linears: Iterable[str]) -> dict[str, Scheme]:
    """The scheme of each of `linears` (module names), those that stay in high precision left out.

    Raises:
        IntegrityError: the config holds a group that this version does not read.
    """
    ignore = config.get("ignore") or []
    found: dict[str, Scheme] = {}
    for name in linears:
        if any(_matches(target, name) for target in ignore):
            continue
        for group in config["config_groups"].values():
            if any(target == "Linear" or _matches(target, name) for target in group["targets"]):
                found[name] = scheme_of_group(group)
                break
    return found


def scheme_of_group(group: Mapping[str, Any]) -> Scheme:
    """The scheme that one config group describes.

    Raises:
        IntegrityError: it is none that this version reads.
    """
    weights = group["weights"]
    for part in (weights, group.get("input_activations") or {}):
        if not isinstance(part, Mapping):
            raise IntegrityError(
                f"a group of config_groups has {str(part)[:40]!r} for arguments",
                "use an artifact written by this version",
            )
    if (blocks := block_groups.scheme_of(weights, group.get("input_activations"))) is not None:
        return blocks
    inputs = _inputs(group.get("input_activations") or None)
    strategy, symmetric = weights.get("strategy"), bool(weights.get("symmetric", True))
    if weights.get("type") == "int" and strategy in ("group", "channel"):
        size = weights["group_size"] if strategy == "group" else None
        _check_counts(weights["num_bits"], size)
        if inputs is None or (size is None and symmetric and weights["num_bits"] == 8 and inputs.type == "int"):
            return IntScheme(int(weights["num_bits"]), size, symmetric, inputs)
    granularity = _FP8_GRANULARITIES.get(str(strategy))
    if weights.get("type") == "float" and weights.get("num_bits") == 8 and granularity and symmetric and inputs:
        tile = weights.get("block_structure")
        if inputs.type == "float" and (granularity != "tile" or tile == [FP8_TILE, FP8_TILE]):
            return Fp8Scheme(granularity, inputs)
    beside = "" if inputs is None else f" and inputs of type {inputs.type!r}"
    raise IntegrityError(
        f"weights of type {weights.get('type')!r} with strategy {strategy!r}{beside} cannot be read here",
        "use an artifact written by this version",
    )


def _check_counts(bits: object, size: object) -> None:
    if not isinstance(bits, int) or not 2 <= bits <= 8 or not (size is None or (isinstance(size, int) and size > 0)):
        raise IntegrityError(
            f"codes of {bits!r} bits in groups of {size!r} cannot be read here",
            "use an artifact written by this version",
        )


def _inputs(args: Mapping[str, Any] | None) -> InputScheme | None:
    if args is None:
        return None
    kind: Any = args.get("type")
    strategy, dynamic = args.get("strategy"), args.get("dynamic")
    known = args.get("num_bits") == 8 and kind in ("int", "float") and bool(args.get("symmetric", True))
    if known and dynamic is True and strategy == "token":
        return InputScheme(kind, "token")
    if known and dynamic is True and strategy == "group" and args.get("group_size"):
        return InputScheme(kind, "group", int(args["group_size"]))
    if known and not dynamic and strategy == "tensor":
        return InputScheme(kind, "tensor")
    raise IntegrityError(
        f"inputs of type {kind!r} with strategy {strategy!r}, dynamic {dynamic!r}, cannot be read here",
        "use an artifact written by this version",
    )


def _matches(target: object, name: str) -> bool:
    if isinstance(target, str) and target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target == name


def _weight_args(scheme: Scheme) -> dict[str, Any]:
    if isinstance(scheme, BlockFloatScheme):
        return block_groups.arguments(scheme, dynamic=False)
    if isinstance(scheme, Fp8Scheme):
        tile = {"block_structure": [FP8_TILE, FP8_TILE]} if scheme.granularity == "tile" else {}
        strategy = {"tensor": "tensor", "channel": "channel", "tile": "block"}[scheme.granularity]
        return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False, **tile}
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
        "actorder": None,
    }


def _input_args(inputs: InputScheme) -> dict[str, Any]:
    if inputs.scale_type != "float":
        return block_groups.input_arguments(inputs)
    return {
        "num_bits": 8,
        "type": inputs.type,
        "symmetric": True,
        "strategy": inputs.granularity,
        "group_size": inputs.group_size,
        "dynamic": inputs.dynamic,
    }

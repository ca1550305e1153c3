"""What rules about engines look at: facts of a model directory and of its quantised linears, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.errors import IntegrityError
from compress.evaluation.costs.sizes import classify
from compress.formats.compressed_tensors import is_for_own_reader
from compress.formats.gptq import QUANT_METHOD as GPTQ
from compress.formats.layouts import quantized_linears
from compress.formats.registry import format_of, schemes_of
from compress.models.checkpoint import Checkpoint
from compress.types import FP8_TILE, BlockFloatScheme, Fp8Scheme, IntScheme, NormalFloatScheme, Scheme

Facts = dict[str, str | int | bool]

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Linears of one module that engines load as one matrix."""
GLOBAL_SCALES = ("weight_global_scale", "weight_scale_2")
"""What the formats call the number of a whole NVFP4 matrix."""
SPLIT_BY_INPUTS = ("o_proj", "down_proj", "w2", "dense", "dense_4h_to_h", "fc2", "out_proj", "c_proj")
"""Linears whose inputs are shared out among GPUs; of all others it is the outputs."""
ON_EVERY_GPU = ("q_a_proj", "kv_a_proj_with_mqa")


def facts_of(checkpoint: Checkpoint, gpus: int = 1) -> tuple[Facts, dict[str, Facts]]:
    """The facts of a model, and those of each of its quantised linears; engines.yaml says what they are.

    gpus: how many share each linear out among them; shapes are then what one of them gets.
    """
    config = checkpoint.config
    model: Facts = {"model_type": str(config.get("model_type")), "tied": bool(config.get("tie_word_embeddings"))}
    if gpus > 1 and (heads := config.get("num_attention_heads")):
        model["whole_heads"] = int(heads) % gpus == 0
    quantization = config.get("quantization_config")
    if not quantization:
        return {**model, "format": "dense", "schemes": 0}, {}
    if is_for_own_reader(quantization):
        packed = any(classify(name) == "embedding" for name in quantized_linears(checkpoint.index))
        return {**model, "format": "own", "packed_embedding": packed}, {}
    found = format_of(quantization) if isinstance(quantization, Mapping) else None
    try:
        schemes = {} if found is None else schemes_of(quantization, checkpoint.index)[1]
    except (IntegrityError, KeyError, TypeError):
        found, schemes = None, {}
    if found is None:
        return {**model, "format": "unknown"}, {}
    model |= {
        "format": found.name,
        "schemes": len(set(schemes.values())),
        "kv_cache": bool(quantization.get("kv_cache_scheme")),
        "act_order": quantization.get("quant_method") == GPTQ and bool(quantization.get("desc_act")),
        "experts": any(".experts." in name for name in schemes),
        "packed_embedding": any(classify(name) == "embedding" for name in schemes),
    }
    linears = {name: _linear(checkpoint, name, found.name, scheme) for name, scheme in schemes.items()}
    for name, shared in _shared_scales(checkpoint, linears).items():
        linears[name]["shared_scale"] = shared
    if gpus > 1:
        linears = {name: facts | _part(name, facts, checkpoint.config, gpus) for name, facts in linears.items()}
    return model, linears


def _linear(checkpoint: Checkpoint, name: str, format: str, scheme: Scheme) -> Facts:
    facts: Facts = {"expert": ".experts." in name, "bits": scheme.bits, "symmetric": scheme.symmetric}
    kind = classify(name)
    facts["place"] = str(kind) if kind in ("embedding", "head") else "block"
    facts["inputs"] = "none" if scheme.inputs is None else scheme.inputs.granularity
    if isinstance(scheme, IntScheme):
        facts |= {"kind": "int", "group_size": -1 if scheme.group_size is None else scheme.group_size}
    if isinstance(scheme, Fp8Scheme):
        facts |= {"kind": "fp8", "granularity": scheme.granularity}
    if isinstance(scheme, BlockFloatScheme):
        facts |= {"kind": scheme.name.lower().removesuffix("a16"), "group_size": scheme.group_size}
    if isinstance(scheme, NormalFloatScheme):
        facts |= {"kind": "nf4", "group_size": scheme.group_size}
    out, width = _shape(checkpoint, name, format, scheme)
    return facts | {"out_features": out, "in_features": width}


def _shape(checkpoint: Checkpoint, name: str, format: str, scheme: Scheme) -> tuple[int, int]:
    """(out, in) of a quantised linear, from the shapes of what it stores."""
    index = checkpoint.index
    if f"{name}.weight_shape" in index:
        out, width = checkpoint.read(f"{name}.weight_shape").tolist()
        return int(out), int(width)
    if f"{name}.qweight" in index:
        rows, columns = index[f"{name}.qweight"].shape
        return (columns * 8, rows) if format == "awq" else (columns, rows * 32 // scheme.bits)
    if f"{name}.weight_packed" in index:
        out, stored = index[f"{name}.weight_packed"].shape
        return out, stored * 8 // scheme.bits
    out, width = index[f"{name}.weight"].shape
    return out, width


def _shared_scales(checkpoint: Checkpoint, linears: Mapping[str, Facts]) -> dict[str, bool]:
    """Of linears in NVFP4 that engines load as one matrix with others: whether their global scales are equal."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name, facts in linears.items():
        module, _, last = name.rpartition(".")
        together = next((number for number, group in enumerate(FUSED) if last in group), None)
        if facts.get("kind") == "nvfp4" and together is not None:
            groups.setdefault((module, together), []).append(name)
    equal = {place: len({_global_scale(checkpoint, name) for name in group}) == 1 for place, group in groups.items()}
    return {name: equal[place] for place, group in groups.items() for name in group}


def _global_scale(checkpoint: Checkpoint, name: str) -> float:
    stored = next(f"{name}.{kind}" for kind in GLOBAL_SCALES if f"{name}.{kind}" in checkpoint.index)
    return float(checkpoint.read(stored).reshape(-1)[0])


def _part(name: str, facts: Facts, config: Mapping[str, Any], gpus: int) -> Facts:
    """What one of several GPUs gets of a linear: its shape, whether all get as much, and whether no group is cut.

    Keys and values of fewer heads than GPUs are there several times, as engines hold them.
    """
    last = name.rpartition(".")[2]
    if facts["place"] != "block" or last in ON_EVERY_GPU:
        return {}
    side = "in_features" if last in SPLIT_BY_INPUTS else "out_features"
    parts = min(gpus, int(config.get("num_key_value_heads") or gpus)) if last in ("k_proj", "v_proj") else gpus
    part = int(facts[side]) // parts
    tile = FP8_TILE if facts.get("granularity") == "tile" else 1
    group = max(int(facts.get("group_size", 1)), 1) if side == "in_features" else 1
    return {
        side: part,
        "whole": int(facts[side]) % parts == 0,
        "whole_groups": part % max(group, tile) == 0,
    }

"""A packed copy of a checkpoint and its fake-quantised dense twin, made with nothing but the format's own functions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.formats.compressed_tensors import for_own_reader, quantization_config
from compress.formats.layouts import pack
from compress.models.checkpoint import Checkpoint
from compress.models.skeleton import LinearSpec, Skeleton
from compress.models.tables import is_tied, tables
from compress.types import IntScheme, QuantizedTensor

Choose = Callable[[LinearSpec], IntScheme | None]


def quantize(weight: Tensor, scheme: IntScheme) -> QuantizedTensor:
    """Plain rounding of weight (out, in)."""
    groups = weight.float().reshape(weight.shape[0], scheme.groups(weight.shape[1]), -1)
    if scheme.symmetric:
        scale = (groups.abs().amax(-1) / scheme.qmax).to(weight.dtype)
        zero = torch.zeros_like(scale)
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = ((high - low) / (2**scheme.bits - 1)).to(weight.dtype)
        zero = (scheme.qmin - low / scale.float()).round().clamp(scheme.qmin, scheme.qmax)
    codes = (groups / scale.float().unsqueeze(-1) + zero.float().unsqueeze(-1)).round().clamp(scheme.qmin, scheme.qmax)
    stored_zero = None if scheme.symmetric else zero.to(torch.int8)
    return QuantizedTensor(codes.to(torch.int8).reshape(weight.shape), scale, stored_zero, scheme)


def write_packed(source: Path, target: Path, choose: Choose, outside: bool = False) -> tuple[Path, Path]:
    """Writes `target/packed` and `target/dense`: equal models, one packed by `choose`, one with decoded weights.

    outside: `choose` is asked of embedding and head too.
    """
    checkpoint = Checkpoint.open(source)
    packed, dense = load_file(source / "model.safetensors"), load_file(source / "model.safetensors")
    schemes: dict[str, IntScheme] = {}
    ignored: list[str] = []
    conv1d = False
    skeleton = Skeleton(checkpoint, torch.float32)
    for spec in (*skeleton.linears(), *(tables(skeleton) if outside else ())):
        scheme = choose(spec)
        if scheme is None:
            ignored.append(spec.name)
            continue
        weight = packed.pop(spec.weight)
        quantized = quantize(weight.T if spec.layout == "conv1d" else weight, scheme)
        packed.update({f"{spec.name}.{name}": tensor for name, tensor in pack(quantized).items()})
        decoded = quantized.dequantize()
        dense[spec.weight] = (decoded.T if spec.layout == "conv1d" else decoded).contiguous()
        schemes[spec.name] = scheme
        conv1d = conv1d or spec.layout == "conv1d"
    config = dict(checkpoint.config)
    quantization = quantization_config(schemes, [*ignored, *({"lm_head"} - set(schemes))])
    if (
        (outside and is_tied(skeleton))
        or conv1d
        or any(not scheme.symmetric and "experts" in name for name, scheme in schemes.items())
    ):
        quantization = for_own_reader(quantization)
    for name, tensors, settings in (
        ("packed", packed, {**config, "quantization_config": quantization}),
        ("dense", dense, config),
    ):
        shutil.copytree(source, target / name)
        (target / name / "config.json").write_text(json.dumps(settings))
        save_file(tensors, target / name / "model.safetensors", {"format": "pt"})
    return target / "packed", target / "dense"


def fitting(bits: int, group_size: int | None = 32, symmetric: bool = True) -> Choose:
    """This scheme for every linear, per channel where the group does not divide the width."""

    def choose(spec: LinearSpec) -> IntScheme:
        scheme = IntScheme(bits, group_size, symmetric)
        return scheme if scheme.fits(spec.in_features) else IntScheme(bits, None, symmetric)

    return choose

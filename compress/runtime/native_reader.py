"""Quantised checkpoints as a dense state dict, one weight at a time, and how their linears round what enters them.

Reads compressed-tensors' `pack-quantized`, `int-quantized`, `float-quantized`, `nvfp4-pack-quantized`,
`mxfp4-pack-quantized` and `mxfp8-quantized`, and our own layouts for what compressed-tensors cannot carry, with
`reader` set to `compress`: the same tensors under the same names for Conv1D linears and for fused experts with zero
points or as blocks of floats, and `sparse-bitmask` for weights with many zeros. Every linear is decoded with the scheme
of its own config group, so models of several bit widths come out right, and in the scale's dtype, so a weight has
exactly the value that a kernel working in that dtype gives it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import EllipsisType
from typing import Any

from torch import Tensor, nn

from compress.errors import IntegrityError
from compress.formats import bitmask, kv_cache
from compress.formats.compressed_tensors import format_of, is_for_own_reader, scheme_of_group, schemes_from_config
from compress.formats.layouts import PACKED_SUFFIX, PARTS, input_scale_name, quantized_linears, unpack
from compress.models.checkpoint import Checkpoint
from compress.types import InputScheme, Scheme


class LazyWeight:
    """A tensor that is read, and where quantised decoded, when `[...]` asks for it: what transformers' loader calls."""

    def __init__(
        self, checkpoint: Checkpoint, name: str, scheme: Scheme | None = None, transposed: bool = False
    ) -> None:
        self._checkpoint = checkpoint
        self._name = name
        self._scheme = scheme
        self._transposed = transposed

    def __getitem__(self, key: EllipsisType) -> Tensor:
        if self._scheme is None:
            return self._checkpoint.read(self._name)
        linear = self._name.removesuffix(".weight")
        names = {part: f"{linear}.{part}" for part in PARTS}
        stored = {part: self._checkpoint.read(n) for part, n in names.items() if n in self._checkpoint.index}
        try:
            weight = unpack(stored, self._scheme).dequantize()
        except IntegrityError as error:
            raise IntegrityError(f"{linear}: {error.message}", error.hint) from error
        return weight.T.contiguous() if self._transposed else weight


class SparseWeight(LazyWeight):
    """A weight of which only what is not zero is stored."""

    def __getitem__(self, key: EllipsisType) -> Tensor:
        linear = self._name.removesuffix(".weight")
        names = {part: f"{linear}.{part}" for part in bitmask.PARTS}
        stored = {part: self._checkpoint.read(n) for part, n in names.items() if n in self._checkpoint.index}
        try:
            return bitmask.unpack(stored)
        except IntegrityError as error:
            raise IntegrityError(f"{linear}: {error.message}", error.hint) from error


def reads(config: Mapping[str, Any]) -> bool:
    """Whether this config.json describes a checkpoint that this module decodes."""
    quantization = config.get("quantization_config")
    if is_for_own_reader(quantization):
        return True
    if not isinstance(quantization, Mapping):
        return False
    if quantization.get("kv_cache_scheme") is not None and not kv_cache.is_described(quantization):
        return False
    groups = quantization.get("config_groups")
    if quantization.get("quant_method") != "compressed-tensors" or not isinstance(groups, Mapping) or not groups:
        return False
    return all(_is_known(group, quantization.get("format")) for group in groups.values())


def dense_state(checkpoint: Checkpoint, conv1d: Collection[str] = ()) -> dict[str, LazyWeight]:
    """Every tensor by its dense name, quantised linears as `<linear>.weight`; nothing is read yet.

    `conv1d` names the linears that the model keeps as (in, out), as GPT-2 does; quantised weights are always (out, in).

    Raises:
        IntegrityError: a quantised linear that no group of the config describes.
    """
    index, schemes = checkpoint.index, schemes_of(checkpoint)
    sparse = [name.removesuffix(bitmask.MASK_SUFFIX) for name in index if name.endswith(bitmask.MASK_SUFFIX)]
    stored = {f"{linear}.{part}" for linear in schemes for part in PARTS}
    stored |= {f"{linear}.{part}" for linear in sparse for part in bitmask.PARTS}
    if kv_cache.is_described(checkpoint.config.get("quantization_config") or {}):
        stored |= {f"{attention}.{part}" for attention in kv_cache.attentions(index) for part in kv_cache.PARTS}
    state = {name: LazyWeight(checkpoint, name) for name in index if name not in stored}
    for linear in sparse:
        state[f"{linear}.weight"] = SparseWeight(checkpoint, f"{linear}.weight")
    for linear, scheme in schemes.items():
        weight = f"{linear}.weight"
        if weight in index and linear + PACKED_SUFFIX in index:
            raise IntegrityError(f"{weight} is stored both packed and dense", "run `compress verify` on the artifact")
        state[weight] = LazyWeight(checkpoint, weight, scheme, transposed=linear in conv1d)
    return state


def input_schemes(checkpoint: Checkpoint) -> dict[str, tuple[InputScheme, Tensor | None]]:
    """How each linear rounds its inputs, those that do not left out: the scheme, and the stored scale (1,) if static.

    Raises:
        IntegrityError: a static scale is missing, is not one number, or is none that can be divided by.
    """
    found: dict[str, tuple[InputScheme, Tensor | None]] = {}
    for linear, scheme in schemes_of(checkpoint).items():
        if scheme.inputs is None:
            continue
        scale = None
        if not scheme.inputs.dynamic:
            name = f"{linear}.{input_scale_name(scheme.inputs)}"
            scale = checkpoint.read(name).clone() if name in checkpoint.index else None
            if scale is None or scale.numel() != 1 or not 0 < float(scale) < float("inf"):
                raise IntegrityError(f"{name} is not one positive number", "run `compress verify` on the artifact")
        found[linear] = (scheme.inputs, scale)
    return found


def schemes_of(checkpoint: Checkpoint) -> dict[str, Scheme]:
    """The scheme of every quantised linear. IntegrityError for one that no group of the config describes."""
    linears = quantized_linears(checkpoint.index)
    schemes = schemes_from_config(checkpoint.config["quantization_config"], linears)
    if unknown := [name for name in linears if name not in schemes]:
        raise IntegrityError(
            f"{unknown[0]} is packed, but no group of quantization_config describes it",
            "config.json and the weights do not belong together: run `compress verify`",
        )
    return schemes


def load_dense_state(path: str | Path, conv1d: Collection[str] = ()) -> dict[str, Tensor]:
    """All tensors of a packed checkpoint in memory, by dense name and in the checkpoint's own dtypes."""
    return {name: weight[...] for name, weight in dense_state(Checkpoint.open(path), conv1d).items()}


def conv1d_linears(model: nn.Module) -> set[str]:
    """Names of the (in, out) linears of a model, with and without its base prefix (checkpoints hold either)."""
    from transformers.pytorch_utils import Conv1D

    names = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return names | {name.removeprefix(prefix) for name in names}


def _is_known(group: Any, default_format: Any) -> bool:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping) or weights.get("actorder") not in (None, "static", "weight"):
        return False
    try:
        scheme = scheme_of_group(group)
    except (IntegrityError, KeyError):
        return False
    return (group.get("format") or default_format) == format_of(scheme) and not group.get("output_activations")

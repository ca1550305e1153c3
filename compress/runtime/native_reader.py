"""Quantised checkpoints as a dense state dict, one weight at a time, and how their linears round what enters them.

Reads every format of `formats/registry.py`: compressed-tensors' `pack-quantized`, `int-quantized`, `float-quantized`,
`nvfp4-pack-quantized`, `mxfp4-pack-quantized` and `mxfp8-quantized`, AutoAWQ's, GPTQ's, ModelOpt's, bitsandbytes' NF4,
and our own layouts for what compressed-tensors cannot carry, with `reader` set to `compress`: the same tensors under
the same names for Conv1D linears and for fused experts with zero points or as blocks of floats, and `sparse-bitmask`
for weights with many zeros. Every linear is decoded with the scheme of its own config group, so models of several bit
widths come out right, and in the scale's dtype, so a weight has exactly the value that a kernel working in that dtype
gives it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import EllipsisType
from typing import Any

from torch import Tensor, nn

from compress.errors import IntegrityError
from compress.formats import bitmask, kv_cache, registry
from compress.formats.compressed_tensors import format_of, is_for_own_reader, scheme_of_group
from compress.formats.layouts import PACKED_SUFFIX
from compress.formats.registry import Format
from compress.models.checkpoint import Checkpoint
from compress.types import InputScheme, Scheme


class LazyWeight:
    """A tensor that is read, and where quantised decoded, when `[...]` asks for it: what transformers' loader calls."""

    def __init__(
        self, checkpoint: Checkpoint, name: str, packed: tuple[Format, Scheme] | None = None, transposed: bool = False
    ) -> None:
        self._checkpoint = checkpoint
        self._name = name
        self._packed = packed
        self._transposed = transposed

    @property
    def packed(self) -> bool:
        """Whether it is decoded."""
        return self._packed is not None

    def __getitem__(self, key: EllipsisType) -> Tensor:
        if self._packed is None:
            return self._checkpoint.read(self._name)
        linear, (format, scheme) = self._name.removesuffix(".weight"), self._packed
        try:
            weight = format.weight(stored_parts(self._checkpoint, linear, format), scheme)
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


def stored_parts(checkpoint: Checkpoint, linear: str, format: Format) -> dict[str, Tensor]:
    """What a quantised linear stores, by local name."""
    names = {part: f"{linear}.{part}" for part in format.parts}
    return {part: checkpoint.read(name) for part, name in names.items() if name in checkpoint.index}


def reads(config: Mapping[str, Any]) -> bool:
    """Whether this config.json describes a checkpoint that this module decodes."""
    quantization = config.get("quantization_config")
    if is_for_own_reader(quantization):
        return True
    if not isinstance(quantization, Mapping):
        return False
    if quantization.get("kv_cache_scheme") is not None and not kv_cache.is_described(quantization):
        return False
    found = registry.format_of(quantization)
    if found is not None and found.name != "compressed-tensors":
        try:
            found.schemes(quantization, [""])
        except (IntegrityError, TypeError):
            return False
        return True
    groups = quantization.get("config_groups")
    if found is None or not isinstance(groups, Mapping) or not groups:
        return False
    return all(_is_known(group, quantization.get("format")) for group in groups.values())


def dense_state(checkpoint: Checkpoint, conv1d: Collection[str] = ()) -> dict[str, LazyWeight]:
    """Every tensor by its dense name, quantised linears as `<linear>.weight`; nothing is read yet.

    `conv1d` names the linears that the model keeps as (in, out), as GPT-2 does; quantised weights are always (out, in).

    Raises:
        IntegrityError: a quantised linear that no group of the config describes.
    """
    index = checkpoint.index
    format, schemes = packed_linears(checkpoint)
    sparse = [name.removesuffix(bitmask.MASK_SUFFIX) for name in index if name.endswith(bitmask.MASK_SUFFIX)]
    stored = {f"{linear}.{part}" for linear in schemes for part in format.parts}
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
        state[weight] = LazyWeight(checkpoint, weight, (format, scheme), transposed=linear in conv1d)
    return state


def input_schemes(checkpoint: Checkpoint) -> dict[str, tuple[InputScheme, Tensor | None]]:
    """How each linear rounds its inputs, those that do not left out: the scheme, and the stored scale (1,) if static.

    Raises:
        IntegrityError: a static scale is missing, is not one number, or is none that can be divided by.
    """
    found: dict[str, tuple[InputScheme, Tensor | None]] = {}
    format, schemes = packed_linears(checkpoint)
    for linear, scheme in schemes.items():
        if scheme.inputs is None:
            continue
        scale = None
        if not scheme.inputs.dynamic:
            try:
                scale = format.input_scale(stored_parts(checkpoint, linear, format), scheme)
            except IntegrityError as error:
                raise IntegrityError(f"{linear}.{error.message}", error.hint) from error
        found[linear] = (scheme.inputs, scale)
    return found


def packed_linears(checkpoint: Checkpoint) -> tuple[Format, dict[str, Scheme]]:
    """The format, and the scheme of every quantised linear.

    Raises:
        IntegrityError: one that the config does not describe, or a scheme that is not read here.
    """
    return registry.schemes_of(checkpoint.config["quantization_config"], checkpoint.index)


def schemes_of(checkpoint: Checkpoint) -> dict[str, Scheme]:
    """The scheme of every quantised linear, as `packed_linears` finds it."""
    return packed_linears(checkpoint)[1]


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

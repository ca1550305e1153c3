"""Packed integer checkpoints as a dense state dict, one weight at a time.

Reads compressed-tensors' `pack-quantized` and our own layout for what compressed-tensors cannot carry (Conv1D linears,
asymmetric fused experts): the same packed tensors under the same names, with `reader` set to `compress`. Every linear
is decoded with the scheme of its own config group, so models of several bit widths come out right, and in the scale's
dtype, so a weight has exactly the value that a kernel working in that dtype gives it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import EllipsisType
from typing import Any

from torch import Tensor, nn

from compress.errors import IntegrityError
from compress.formats.compressed_tensors import FORMAT, is_for_own_reader, schemes_from_config
from compress.formats.int_packed import unpack
from compress.models.checkpoint import Checkpoint
from compress.types import IntScheme

_PACKED = ".weight_packed"
_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


class LazyWeight:
    """A tensor that is read, and where packed decoded, when `[...]` asks for it: what transformers' loader calls."""

    def __init__(
        self, checkpoint: Checkpoint, name: str, scheme: IntScheme | None = None, transposed: bool = False
    ) -> None:
        self._checkpoint = checkpoint
        self._name = name
        self._scheme = scheme
        self._transposed = transposed

    def __getitem__(self, key: EllipsisType) -> Tensor:
        if self._scheme is None:
            return self._checkpoint.read(self._name)
        linear = self._name.removesuffix(".weight")
        names = {part: f"{linear}.{part}" for part in _PARTS}
        stored = {part: self._checkpoint.read(n) for part, n in names.items() if n in self._checkpoint.index}
        try:
            weight = unpack(stored, self._scheme).dequantize()
        except IntegrityError as error:
            raise IntegrityError(f"{linear}: {error.message}", error.hint) from error
        return weight.T.contiguous() if self._transposed else weight


def reads(config: Mapping[str, Any]) -> bool:
    """Whether this config.json describes a checkpoint that this module decodes."""
    quantization = config.get("quantization_config")
    if is_for_own_reader(quantization):
        return True
    if not isinstance(quantization, Mapping):
        return False
    groups = quantization.get("config_groups")
    if quantization.get("quant_method") != "compressed-tensors" or not isinstance(groups, Mapping) or not groups:
        return False
    return all(_is_packed_integers(group, quantization.get("format")) for group in groups.values())


def dense_state(checkpoint: Checkpoint, conv1d: Collection[str] = ()) -> dict[str, LazyWeight]:
    """Every tensor by its dense name, packed linears as `<linear>.weight`; nothing is read yet.

    `conv1d` names the linears that the model keeps as (in, out), as GPT-2 does; packed weights are always (out, in).

    Raises:
        IntegrityError: a packed linear that no group of the config describes.
    """
    index = checkpoint.index
    linears = [name.removesuffix(_PACKED) for name in index if name.endswith(_PACKED)]
    schemes = schemes_from_config(checkpoint.config["quantization_config"], linears)
    if unknown := [name for name in linears if name not in schemes]:
        raise IntegrityError(
            f"{unknown[0]} is packed, but no group of quantization_config describes it",
            "config.json and the weights do not belong together: run `compress verify`",
        )
    stored = {f"{linear}.{part}" for linear in linears for part in _PARTS}
    state = {name: LazyWeight(checkpoint, name) for name in index if name not in stored}
    for linear, scheme in schemes.items():
        weight = f"{linear}.weight"
        if weight in state:
            raise IntegrityError(f"{weight} is stored both packed and dense", "run `compress verify` on the artifact")
        state[weight] = LazyWeight(checkpoint, weight, scheme, transposed=linear in conv1d)
    return state


def load_dense_state(path: str | Path, conv1d: Collection[str] = ()) -> dict[str, Tensor]:
    """All tensors of a packed checkpoint in memory, by dense name and in the checkpoint's own dtypes."""
    return {name: weight[...] for name, weight in dense_state(Checkpoint.open(path), conv1d).items()}


def conv1d_linears(model: nn.Module) -> set[str]:
    """Names of the (in, out) linears of a model, with and without its base prefix (checkpoints hold either)."""
    from transformers.pytorch_utils import Conv1D

    names = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return names | {name.removeprefix(prefix) for name in names}


def _is_packed_integers(group: Any, default_format: Any) -> bool:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    return (
        isinstance(weights, Mapping)
        and weights.get("type") == "int"
        and weights.get("strategy") in ("group", "channel")
        and weights.get("actorder") in (None, "static", "weight")
        and not group.get("input_activations")
        and (group.get("format") or default_format) == FORMAT
    )

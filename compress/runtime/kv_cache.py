"""Rounding keys and values as a checkpoint's FP8 cache does, so that scores are those of a run with that cache."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from compress.errors import IntegrityError
from compress.formats import kv_cache as layout
from compress.formats.inputs import round_inputs
from compress.models import kv_cache
from compress.models.checkpoint import Checkpoint

Scales = tuple[Tensor, Tensor]


def stored_scales(checkpoint: Checkpoint) -> dict[str, Scales]:
    """The scales of keys and values by attention; none where the config describes no such cache.

    Raises:
        IntegrityError: a scale is missing, or no positive number.
    """
    if not layout.is_described(checkpoint.config.get("quantization_config") or {}):
        return {}
    found: dict[str, Scales] = {}
    for attention in layout.attentions(checkpoint.index):
        names = [f"{attention}.{part}" for part in layout.PARTS]
        for name in names:
            scale = checkpoint.read(name) if name in checkpoint.index else None
            if scale is None or scale.numel() != 1 or not 0 < float(scale) < float("inf"):
                raise IntegrityError(f"{name} is not one positive number", "run `compress verify` on the artifact")
        found[attention] = (checkpoint.read(names[0]).clone(), checkpoint.read(names[1]).clone())
    return found


def round_cache_of(model: nn.Module, scales: Mapping[str, Scales]) -> None:
    """Makes the attentions of a model round their keys and values.

    Raises:
        IntegrityError: an attention without scales, or scales without an attention.
    """
    if not scales:
        return
    attentions = kv_cache.attentions(model)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    named = {name if name in attentions else prefix + name: pair for name, pair in scales.items()}
    if odd := sorted(named.keys() ^ attentions.keys()):
        raise IntegrityError(
            f"{odd[0]} has keys and values or their scales, but not both", "run `compress verify` on the artifact"
        )
    for name, pair in named.items():
        kv_cache.tap(attentions[name], _rounding(pair))


def _rounding(scales: Scales) -> kv_cache.Change:
    def change(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = scales
        return round_inputs(key, layout.ROUNDING, keys), round_inputs(value, layout.ROUNDING, values)

    return change

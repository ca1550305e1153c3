"""The zeros of a pruned model as invariants: where they are, and that what is made of it keeps every one.

Any model counts as pruned whose weights hold many exact zeros, whoever made them; of our own artifacts, any linear
whose zeros `layers.json` counts, however few they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from compress.artifact.reader import Artifact
from compress.errors import WorkError
from compress.models.checkpoint import Checkpoint
from compress.models.skeleton import LinearSpec
from compress.pipeline.source import read_finite
from compress.pruning.masks import zero_mask
from compress.types import QuantizedTensor


def sparsity_masks(checkpoint: Checkpoint, specs: Sequence[LinearSpec]) -> Iterator[tuple[str, Tensor]]:
    """Of the linears that were pruned: the weight's name, and where it is zero, bool in the shape that is stored.

    One at a time, so that no more than one is in memory. WorkError where a weight is not finite.
    """
    recorded = recorded_as_pruned(checkpoint)
    for spec in specs:
        mask = zero_mask(read_finite(checkpoint, spec.weight), spec.name in recorded)
        if mask is not None:
            yield spec.weight, mask


def recorded_as_pruned(checkpoint: Checkpoint) -> frozenset[str]:
    """The linears of one of our artifacts whose zeros were made by pruning, as its layers.json has it; else none."""
    layers = Artifact.open(checkpoint.path).layers() if checkpoint.is_artifact else []
    return frozenset(layer["name"] for layer in layers if "zeros" in (layer.get("details") or {}))


def held(name: str, quantized: QuantizedTensor, zeros: Tensor) -> tuple[QuantizedTensor, int]:
    """The quantised weight with exactly zero wherever `zeros` (out, in) bool says, and how many codes had to move.

    Raises WorkError for a layout whose codes have none for zero.
    """
    strays = (quantized.dequantize() != 0) & zeros
    count = int(strays.sum())
    if not count:
        return quantized, 0
    zero = torch.zeros(())
    if quantized.zero_point is not None:
        group_size = quantized.codes.shape[1] // quantized.zero_point.shape[1]
        zero = quantized.zero_point.float().repeat_interleave(group_size, dim=1)
    codes = torch.where(strays, zero, quantized.codes.float()).to(quantized.codes.dtype)  # 8-bit floats have no fill
    fixed = replace(quantized, codes=codes)
    if bool(((fixed.dequantize() != 0) & zeros).any()):
        raise WorkError(
            f"{quantized.scheme.name} has no code for the {count} zeros of {name} that it left at other values",
            "quantise the model that it was pruned from, or use an integer scheme",
        )
    return fixed, count

"""Reading tensors of the source, and refusing those that no method can make sense of."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import WorkError
from compress.models.checkpoint import Checkpoint
from compress.models.skeleton import LinearSpec


def read_finite(checkpoint: Checkpoint, name: str) -> Tensor:
    """The tensor as stored, mapped from the file. WorkError if it holds NaN or infinite values."""
    tensor = checkpoint.read(name)
    if not tensor.is_floating_point():
        return tensor
    if not torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all():
        raise WorkError(f"{name} holds NaN or infinite values", "restore the checkpoint from its source")
    return tensor


def read_weight(checkpoint: Checkpoint, spec: LinearSpec) -> Tensor:
    """The linear's weight (out, in) float32, whatever its layout on disk. WorkError if it is not finite."""
    stored = read_finite(checkpoint, spec.weight).float()
    return stored.T.contiguous() if spec.layout == "conv1d" else stored

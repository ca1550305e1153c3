"""Models on a GPU through transformers, their quantised linears packed and multiplied by the Triton kernels.

Everything else, attention among it, is transformers' own. Weights are decoded once at load, on the CPU, to probe the
kernels against them. No CUDA graphs: transformers' cache grows while it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compress.errors import UserError
from compress.kernels.triton import available
from compress.models.checkpoint import Checkpoint
from compress.runtime import native_reader, triton_linears
from compress.runtime.swapped import SwappedRuntime
from compress.runtime.transformers_backend import chosen_device, chosen_dtype
from compress.runtime.transformers_loader import load_model


def obstacle(checkpoint: Checkpoint) -> str | None:
    """Why no linear of a checkpoint is computed by Triton kernels, wherever they run; None if one may be."""
    return None if native_reader.reads(checkpoint.config) else "it has no quantised linears that are read here"


def load(path: str | Path, device: str = "auto", dtype: str = "auto") -> TritonRuntime:
    """Loads an artifact; `device` and `dtype` as in `transformers_backend.load`.

    Raises:
        UserError: as that does; no device that runs the kernels; no quantised linear that they compute.
        IntegrityError: damaged files, or tensors that do not fit the config.
        WorkError: out of memory, or kernels that are wrong on this device.
    """
    place = chosen_device(device)
    checkpoint = Checkpoint.open(path)
    if (reason := available.obstacle(place) or obstacle(checkpoint)) is not None:
        raise UserError(f"kernel 'triton' does not run {path} on {place}: {reason}", "use --kernel auto")
    runtime = TritonRuntime(checkpoint, place, chosen_dtype(dtype, place, checkpoint))
    if not runtime.swapped.linears:
        reason = next(iter(runtime.swapped.dense.values()), "none is quantised")
        raise UserError(f"no linear of {path} is computed by Triton kernels: {reason}", "use --kernel reference")
    return runtime


class TritonRuntime(SwappedRuntime):
    """A transformers model with packed linears; make one with `load`."""

    name = "transformers+triton"
    kernel = "triton"

    def _build(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Any:
        model = load_model(checkpoint, dtype)
        self.swapped = triton_linears.swap(model, checkpoint, device)
        return model.to(device)

"""The engine on a GPU: decoders of Triton kernels over paged keys and values, decode steps recorded as CUDA graphs.

An answer may differ in rounding with what is computed beside it: products of one token and of several are cut
differently, and so is attention by the longest sequence of a step. The native engine on a CPU promises more.
"""

from __future__ import annotations

import torch

from compress.models.checkpoint import Checkpoint
from compress.runtime.gpu_model import GpuModel
from compress.runtime.memory import guarded
from compress.runtime.native_shape import Shape
from compress.runtime.paged_backend import PagedRuntime
from compress.runtime.protocol import LayerUse


class GpuRuntime(PagedRuntime):
    """A model of a supported architecture on a GPU; make one with `loading.load`."""

    name = "gpu"
    kernel = "triton"
    deterministic = False
    model: GpuModel

    def __init__(
        self,
        checkpoint: Checkpoint,
        shape: Shape,
        device: torch.device,
        dtype: torch.dtype,
        *,
        prefix_cache: bool = False,
        cache_tokens: int | None = None,
        kv_cache: str = "auto",
        kv_skip: str = "none",
    ) -> None:
        """device: a GPU that `available.obstacle` has nothing against, or the CPU in Triton's interpreter.

        cache_tokens: as in `GpuModel`. kv_cache, kv_skip: as in `loading.load`. prefix_cache: as in `PagedRuntime`.
        """
        with guarded("loading the model"):
            model = GpuModel(checkpoint, shape, device, dtype, cache_tokens)
        super().__init__(checkpoint, model, prefix_cache=prefix_cache)
        self.device = str(device)
        self.dtype = str(dtype).removeprefix("torch.")
        self.cache = self._choose_cache(kv_cache, kv_skip)

    def layers(self) -> list[LayerUse]:
        """Every linear with the kernel that multiplies it."""
        return self.model.layers()

"""The engine on a GPU: decoders of Triton kernels over paged keys and values, decode steps recorded as CUDA graphs.

Every sum has one order that its shape decides, so that the same steps repeat bit for bit. An answer may differ in
rounding with what is computed beside it: products of one token and of several are cut differently, and so is attention
by the number of sequences and the longest; unless the model is `deterministic`, as the native engine always is.
"""

from __future__ import annotations

from compress.models.checkpoint import Checkpoint
from compress.runtime.gpu_model import GpuModel
from compress.runtime.paged_backend import PagedRuntime
from compress.runtime.protocol import LayerUse


class GpuRuntime(PagedRuntime):
    """A model of a supported architecture on a GPU; make one with `loading.load`."""

    name = "gpu"
    kernel = "triton"
    model: GpuModel

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: GpuModel,
        *,
        prefix_cache: bool = False,
        kv_cache: str = "auto",
        kv_skip: str = "none",
    ) -> None:
        """kv_cache, kv_skip: as in `loading.load`. prefix_cache: as in `PagedRuntime`."""
        super().__init__(checkpoint, model, prefix_cache=prefix_cache)
        self.device, self.deterministic = str(model.device), model.deterministic
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.cache = self._choose_cache(kv_cache, kv_skip)

    def layers(self) -> list[LayerUse]:
        """Every linear with its kernel and its bytes, the head last."""
        return list(self.model.linears.uses.values())

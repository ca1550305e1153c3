"""The native back end: decoders from packed weights, a decode step being one native call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from compress.kernels.dispatch import native
from compress.models.checkpoint import Checkpoint
from compress.runtime.input_choice import MOST_LOST, rounding_loss
from compress.runtime.memory import guarded
from compress.runtime.native_model import NativeModel
from compress.runtime.native_shape import Shape
from compress.runtime.paged_backend import PagedRuntime
from compress.runtime.protocol import LayerUse


class NativeRuntime(PagedRuntime):
    """A model of a supported architecture behind the `Runtime` protocol; make one with `loading.load`."""

    name = "native"
    device = "cpu"
    dtype = "float32"
    deterministic = True
    model: NativeModel

    def __init__(
        self,
        checkpoint: Checkpoint,
        shape: Shape,
        eight_bit: bool | None,
        *,
        prefix_cache: bool = False,
        cache_tokens: int | None = None,
        kv_cache: str = "auto",
        kv_skip: str = "none",
    ) -> None:
        """eight_bit, cache_tokens: as in `NativeModel`; eight_bit None: of answers the inputs alone, where that costs
        little, as measured (`rounding_loss`), and of scores nothing. kv_cache, kv_skip: as in `loading.load`.

        prefix_cache: calls of `generate` share with earlier ones.
        """
        with guarded("loading the model"):
            model = NativeModel(checkpoint, shape, bool(eight_bit), cache_tokens)
        super().__init__(checkpoint, model, prefix_cache=prefix_cache)
        self.rounding_loss: float | None = None
        self._scores_exactly = eight_bit is None
        if eight_bit is None:
            with guarded("measuring inputs in 8 bits"):
                self.rounding_loss = rounding_loss(self.model, self._sample)
            self.model.eight_bit = self.rounding_loss is not None and self.rounding_loss <= MOST_LOST
        self.kernel = f"cpu-{native().isa()}" + ("-int8" if self.model.eight_bit else "")
        self.cache = self._choose_cache(kv_cache, kv_skip)

    def layers(self) -> list[LayerUse]:
        """Every linear with the kernel that multiplies it."""
        return self.model.layers(f"cpu-{native().isa()}")

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        before = self.model.eight_bit
        self.model.eight_bit = before and not self._scores_exactly
        try:
            yield
        finally:
            self.model.eight_bit = before

"""Sizes of the decoders that are timed on a GPU, and a linear as what times it sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder whose heads are together as wide as its hidden states."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of a layer's linears, those with the same inputs joined as engines do."""
        keys = self.hidden // self.heads * self.kv_heads
        return {
            "qkv": (self.hidden + 2 * keys, self.hidden),
            "o": (self.hidden, self.hidden),
            "gate_up": (2 * self.ffn, self.hidden),
            "down": (self.hidden, self.ffn),
        }


LLAMA_8B = Shape(4096, 14336, 32, 8, 32, 128256)
DRY = Shape(128, 128, 4, 2, 2, 270)

"""A Llama-shaped decoder of random weights made of the kernels alone: one decode step of one sequence, to be timed.

Its linears are callables, so that the same step runs on bfloat16 weights through torch and on packed ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.kernels.triton.cache import PAGE, Cache, write
from compress.kernels.triton.fused import gated, rms_norm, turn_heads
from compress.kernels.triton.paged import paged_attention

Linear = Callable[[Tensor], Tensor]
MakeLinear = Callable[[int, int], Linear]


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocabulary: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of a layer's linears, those with the same inputs joined as engines do."""
        wide = self.heads * self.head_dim
        return {
            "qkv": (wide + 2 * self.kv_heads * self.head_dim, self.hidden),
            "o": (self.hidden, wide),
            "gate_up": (2 * self.ffn, self.hidden),
            "down": (self.hidden, self.ffn),
        }


LLAMA_8B = Shape(4096, 14336, 32, 8, 128, 32, 128256)
DRY = Shape(128, 128, 4, 2, 32, 1, 80)


class Step:
    """One decode step at a position of `context` tokens; call it to get logits (1, vocabulary)."""

    def __init__(self, shape: Shape, make: MakeLinear, head: Linear, context: int, device: torch.device) -> None:
        self.shape = shape
        dtype = torch.bfloat16
        self._layers = [{name: make(*size) for name, size in shape.linears().items()} for _ in range(shape.layers)]
        self._head = head
        self._norm = torch.ones(shape.hidden, dtype=dtype, device=device)
        pages = -(-context // PAGE)
        self._caches = [
            Cache.empty(pages, shape.kv_heads, shape.head_dim, dtype, device) for _ in range(shape.layers)
        ]  # fmt: skip
        self._tables = torch.arange(pages, dtype=torch.int32, device=device).unsqueeze(0)
        self._length = torch.tensor([context], dtype=torch.int32, device=device)
        self._slot = self._length - 1
        angles = (context - 1) * torch.logspace(0, -4, shape.head_dim // 2, device=device).unsqueeze(0)
        self._cos, self._sin = angles.cos(), angles.sin()
        self._x = torch.randn(1, shape.hidden, device=device).to(dtype)

    def __call__(self) -> Tensor:
        shape = self.shape
        residual, x = torch.zeros_like(self._x), self._x
        for linears, cache in zip(self._layers, self._caches, strict=True):
            mixed = linears["qkv"](rms_norm(x, self._norm, 1e-5, residual)).view(1, -1, shape.head_dim)
            turn_heads(mixed, shape.heads, shape.kv_heads, self._cos, self._sin)
            query, key, value = mixed.split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
            write(cache, key, value, self._slot)
            seen = paged_attention(query, cache, self._tables, self._length, shape.head_dim**-0.5)
            x = linears["o"](seen.view(1, -1))
            gate, up = linears["gate_up"](rms_norm(x, self._norm, 1e-5, residual)).chunk(2, -1)
            x = linears["down"](gated(gate, up))
        return self._head(rms_norm(x, self._norm, 1e-5, residual))

"""One decoder layer of Triton kernels and joined products, of every family that `native_families` knows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.kernels.triton.attention import chunk_attention
from compress.kernels.triton.cache import Cache, write
from compress.kernels.triton.fused import Activation, gated, rms_norm, turn_heads
from compress.kernels.triton.paged import paged_attention
from compress.runtime.gpu_inputs import Inputs
from compress.runtime.gpu_linears import Linear

Turn = tuple[Tensor, Tensor]
"""Cosines and sines (tokens, turned numbers of a head / 2) float32."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention. `norms` (2, head_dim) of queries and keys, or None; window 0: all positions.

    same: single tokens go through the kernel of many, whose sums do not depend on how many there are.
    """

    qkv: Linear
    output: Linear
    norms: Tensor | None
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int
    cap: float
    same: bool

    def __call__(self, x: Tensor, turn: Turn, inputs: Inputs, cache: Cache, epsilon: float, offset: float) -> Tensor:
        """x (tokens, hidden) -> (tokens, hidden); keys and values are put into the cache."""
        tokens = x.shape[0]
        mixed = self.qkv(x).view(tokens, -1, self.head_dim)
        turn_heads(mixed, self.heads, self.kv_heads, *turn, self.norms, epsilon, offset)
        query, key, value = mixed.split([self.heads, self.kv_heads, self.kv_heads], 1)
        write(cache, key, value, inputs.slots)
        seen = torch.empty(tokens, self.heads, self.head_dim, dtype=x.dtype, device=x.device)
        single = 0 if self.same else inputs.singles
        if single:
            paged_attention(
                query[:single], cache, inputs.tables[:single], inputs.lengths, self.scale, self.window, self.cap,
                out=seen[:single],
            )  # fmt: skip
        if single < tokens:
            chunk_attention(
                query, cache, inputs.tables, inputs.blocks, self.scale, self.window, self.cap, out=seen
            )  # fmt: skip
        return self.output(seen.view(tokens, -1))


@dataclass(frozen=True, slots=True)
class FeedForward:
    """down(activation(gate) * up), gate and up of one product."""

    gate_up: Linear
    down: Linear
    activation: Activation

    def __call__(self, x: Tensor) -> Tensor:
        """x (tokens, hidden) -> (tokens, hidden)."""
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(gated(gate, up, self.activation))


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention and what follows it. Norms by the names of `LayerNames.norms`, those that a family has.

    rotation: which of the model's turns. offset: what is added to weights of norms. most_recorded: tokens up to which
    nothing that is launched depends on their values.
    """

    attention: Attention
    mlp: Linear
    norms: dict[str, Tensor]
    rotation: int
    epsilon: float
    offset: float
    most_recorded: int

    def __call__(self, x: Tensor | None, residual: Tensor, turn: Turn, inputs: Inputs, cache: Cache) -> Tensor:
        """What is to be added to the residual (tokens, hidden), to which x was added before, in place."""
        entering = self._normed("attention_norm", x, residual)
        x = self.attention(entering, turn, inputs, cache, self.epsilon, self.offset)
        x = self._after("attention_out_norm", x)
        x = self.mlp(self._normed("mlp_norm", x, residual))
        return self._after("mlp_out_norm", x)

    def _normed(self, name: str, x: Tensor | None, residual: Tensor) -> Tensor:
        weight = self.norms[name]
        if x is None:
            return rms_norm(residual, weight, self.epsilon, offset=self.offset)
        return rms_norm(x, weight, self.epsilon, residual, self.offset)

    def _after(self, name: str, x: Tensor) -> Tensor:
        return rms_norm(x, self.norms[name], self.epsilon, offset=self.offset) if name in self.norms else x

"""The decoder of a checkpoint on a GPU: weights packed once, steps of Triton kernels, those of one token recorded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from compress.kernels.triton.cache import CODED, PAGE, Cache, CacheKind
from compress.kernels.triton.fused import Activation, rms_norm
from compress.models.checkpoint import Checkpoint
from compress.runtime.cache_choice import LayerCache
from compress.runtime.gpu_experts import Experts, grouped
from compress.runtime.gpu_graphs import BATCHES, DecodeSteps
from compress.runtime.gpu_inputs import Inputs, inputs_of
from compress.runtime.gpu_layer import Attention, FeedForward, Layer, Turn
from compress.runtime.gpu_linears import GpuLinears, Linear
from compress.runtime.gpu_memory import affordable_pages
from compress.runtime.native_shape import FINAL_NORM, LayerNames, Part, Shape
from compress.runtime.paged_model import Chunk, PagedModel, default_cache_tokens
from compress.runtime.pages import PagePool
from compress.runtime.rotations import rotations


class GpuModel(PagedModel):
    """A decoder over packed weights and dense ones of `dtype`, in which everything between products is rounded too."""

    step_tokens = 1024

    def __init__(
        self,
        checkpoint: Checkpoint,
        shape: Shape,
        device: torch.device,
        dtype: torch.dtype,
        cache_tokens: int | None = None,
        deterministic: bool = False,
    ) -> None:
        """device: a GPU that `available.obstacle` has nothing against, or the CPU in Triton's interpreter.
        cache_tokens: room of the key-value cache, all sequences together, taken at once. None: as on a CPU, or what
        the device has left. Nothing can be computed before `keep` is called. deterministic: no bit of a token's logits
        depends on what else is computed, in chunks or from a found prefix; products and attention are cut alike for any
        number of tokens, which costs time.

        Raises:
            IntegrityError: a packed weight whose stored shape contradicts the config.
            WorkError: a kernel that is wrong on this device, or no memory left for the cache.
        """
        self.shape, self.device, self.dtype, self.deterministic = shape, device, dtype, deterministic
        self.caches = tuple(dict.fromkeys((str(dtype).removeprefix("torch."), "bfloat16", "fp8", "int8", "int4")))
        self._checkpoint = checkpoint
        config, scaled = shape.config, shape.family.scaled
        self._offset = 1.0 if shape.family.offset_norms else 0.0
        self._logit_cap = (config.final_logit_softcapping or 0.0) if scaled else 0.0
        self.linears = GpuLinears(checkpoint, shape, device, dtype, deterministic)
        turns = rotations(shape)
        self._frequencies = torch.stack([frequencies for frequencies, _ in turns.values()]).to(device)
        self._factors = torch.tensor([factor for _, factor in turns.values()], device=device)
        self._embedding = self.linears.embedding()
        self._scale = torch.tensor(shape.hidden**0.5, dtype=dtype, device=device) if scaled else None
        self._layers = [
            self._layer(i, list(turns).index(config.layer_types[i]) if shape.family.rope_by_type else 0)
            for i in range(shape.layers)
        ]
        self._final_norm = self._norm(FINAL_NORM)
        self._head = self.linears.head(self._embedding)
        wanted = default_cache_tokens(config.max_position_embeddings) if cache_tokens is None else cache_tokens
        self.pages = PagePool(
            affordable_pages(shape, dtype, device, wanted, self.step_tokens, least=cache_tokens is not None), PAGE
        )
        self._kept: list[Cache] = []
        most = min(layer.most_recorded for layer in self._layers)
        self._decode = DecodeSteps(self._everything, device, most, deterministic)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of one token in all layers."""
        return sum(cache.token_bytes for cache in self._kept)

    @property
    def reserved_bytes(self) -> int:
        """Bytes of all pages, taken by `keep`."""
        return self.cache_bytes * self.pages.count * self.pages.tokens

    def keep(self, caches: Sequence[LayerCache]) -> None:
        """How each layer keeps keys and values from now on; what was kept is lost."""
        self._kept = []
        self._decode.forget()
        for cache in caches:
            kind: CacheKind = next((kind for kind in CODED if kind == cache.kind), "plain")
            dtype = getattr(torch, cache.kind) if kind == "plain" else self.dtype
            key, value = (torch.tensor([scale], device=self.device) for scale in cache.scales)
            sizes = self.pages.count, self.shape.kv_heads, self.shape.head_dim
            self._kept.append(Cache.empty(*sizes, dtype, self.device, kind, (key, value)))
        self.pages.forget()

    @torch.inference_mode()
    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits (wanted rows, vocabulary) float32 of the chunks, which are computed together, in order."""
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            if self._decode.takes(chunks):
                return self._decode(chunks)
            order = sorted(range(len(chunks)), key=lambda i: len(chunks[i].tokens) > 1)
            inputs = inputs_of([chunks[i] for i in order], blocked=self.deterministic).to(self.device)
            start, starts = 0, [0] * len(chunks)
            for i in order:
                starts[i] = start
                start += len(chunks[i].tokens)
            wanted = [starts[i] + row for i, chunk in enumerate(chunks) for row in chunk.rows]
            x, residual = self._hidden(inputs)
            if not wanted:
                return torch.empty(0, self.shape.vocabulary, device=self.device)
            rows = torch.tensor(wanted, device=self.device)
            return self._logits(x[rows], residual[rows])

    def _everything(self, inputs: Inputs) -> Tensor:
        return self._logits(*self._hidden(inputs))

    def _hidden(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """What the last layer adds, and the residual that it is added to: (tokens, hidden) each."""
        residual = torch.nn.functional.embedding(inputs.tokens, self._embedding)
        if self._scale is not None:
            residual = residual * self._scale
        turns = [self._turn(kind, inputs) for kind in range(len(self._frequencies))]
        x: Tensor | None = None
        for layer, cache in zip(self._layers, self._kept, strict=True):
            x = layer(x, residual, turns[layer.rotation], inputs, cache)
        assert x is not None
        return x, residual

    def _turn(self, kind: int, inputs: Inputs) -> Turn:
        """Cosines and sines of the tokens' positions; of LongRoPE's two kinds each token has its own."""
        frequencies, factors = self._frequencies[kind], self._factors[kind]
        if self.first_context is not None:
            frequencies, factors = self._frequencies[inputs.long], self._factors[inputs.long].unsqueeze(1)
        angles = inputs.positions.unsqueeze(1).float() * frequencies
        return angles.cos() * factors, angles.sin() * factors

    def _logits(self, x: Tensor, residual: Tensor) -> Tensor:
        epsilon = self.shape.config.rms_norm_eps
        logits = self._head(rms_norm(x, self._final_norm, epsilon, residual, self._offset)).float()
        return self._logit_cap * (logits / self._logit_cap).tanh() if self._logit_cap else logits

    def _layer(self, i: int, rotation: int) -> Layer:
        shape, config = self.shape, self.shape.config
        names = shape.layer(i)
        norms = {kind: self._norm(name) for kind, name in names.norms.items() if name is not None}
        heads = [norms.pop(kind) for kind in ("q_norm", "k_norm") if kind in norms]
        scaled, window = shape.family.scaled, shape.windows[i]
        attention = Attention(
            qkv=self.linears.joined(names.attention[:3]),
            output=self.linears.whole(names.attention[3].linear),
            norms=torch.stack(heads) if heads else None,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            scale=(config.query_pre_attn_scalar if scaled else shape.head_dim) ** -0.5,
            window=window if window < config.max_position_embeddings else 0,
            cap=(config.attn_logit_softcapping or 0.0) if config.model_type == "gemma2" else 0.0,
            same=self.deterministic,
        )
        mlp, most = self._mlp(names)
        return Layer(attention, mlp, norms, rotation, config.rms_norm_eps, self._offset, most)

    def _mlp(self, names: LayerNames) -> tuple[Linear, int]:
        """What follows attention, and for how many tokens it can be recorded."""
        experts = [self._feed_forward(expert) for expert in names.experts]
        if names.router is None:
            return experts[0], BATCHES[-1]
        together = grouped(experts, self.deterministic)
        renormalise = bool(getattr(self.shape.config, "norm_topk_prob", True))
        router = self.linears.whole(names.router)
        return Experts(router, experts, together, self.shape.chosen, renormalise), BATCHES[-1] if together else 0

    def _feed_forward(self, parts: Sequence[Part]) -> FeedForward:
        activation: Activation = "gelu_pytorch_tanh" if self.shape.family.scaled else "silu"
        return FeedForward(self.linears.joined(parts[:2]), self.linears.whole(parts[2].linear), activation)

    def _norm(self, name: str) -> Tensor:
        return self._checkpoint.read(f"{name}.weight").to(self.device, self.dtype)

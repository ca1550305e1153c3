"""The native decoder of a checkpoint: weights repacked once, and a whole step as one native call."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.kernels import packed_linear
from compress.kernels.dispatch import native
from compress.models.checkpoint import Checkpoint
from compress.runtime.cache_choice import CACHES, LayerCache
from compress.runtime.native_shape import EMBEDDING, FINAL_NORM, HEAD, LayerNames, Part, Shape
from compress.runtime.native_weights import Stored, input_name, weight_name
from compress.runtime.paged_model import Chunk, PagedModel, default_cache_tokens
from compress.runtime.pages import PagePool
from compress.runtime.protocol import LayerUse
from compress.runtime.rotations import rotations
from compress.types import Scheme


class NativeModel(PagedModel):
    """A decoder over packed, bfloat16 or float32 weights."""

    caches = CACHES

    def __init__(
        self,
        checkpoint: Checkpoint,
        shape: Shape,
        eight_bit: bool,
        cache_tokens: int | None = None,
    ) -> None:
        """eight_bit: inputs of packed linears are rounded to 8 bits, and a dense head is packed in 8 bits.

        cache_tokens: room of the key-value cache, all sequences together; memory is taken as it is needed. None: the
        model's context, but 16,384 at least and 32,768 at most.

        Raises:
            IntegrityError: a packed weight whose stored shape contradicts the config.
        """
        self.shape = shape
        self.eight_bit = eight_bit
        self._checkpoint = checkpoint
        self.linears: dict[str, list[Any]] = {}
        self._sizes = shape.linears()
        native_module = native()
        if cache_tokens is None:
            cache_tokens = default_cache_tokens(shape.config.max_position_embeddings)
        self.pages = PagePool(-(-cache_tokens // native_module.PAGE_TOKENS) + 1, native_module.PAGE_TOKENS)
        turns = rotations(shape)
        self._embedding: Tensor | None = None
        packed = None
        if EMBEDDING in shape.schemes:
            (packed,) = self._pack(EMBEDDING, (shape.vocabulary, shape.hidden))
        else:
            embedding = checkpoint.read(f"{EMBEDDING}.weight")
            self._embedding = embedding.float() if embedding.dtype == torch.float16 else embedding
        config, scaled = shape.config, shape.family.scaled
        self._decoder = native_module.Decoder(
            embedding=self._embedding,
            packed_embedding=packed,
            final_norm=self._norm(FINAL_NORM),
            head=self._head(packed),
            frequencies=torch.stack([frequencies for frequencies, _ in turns.values()]),
            factors=torch.tensor([factor for _, factor in turns.values()]),
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            epsilon=config.rms_norm_eps,
            embedding_scale=shape.hidden**0.5 if scaled else 1.0,
            attention_scale=(config.query_pre_attn_scalar if scaled else shape.head_dim) ** -0.5,
            attention_cap=(config.attn_logit_softcapping or 0.0) if config.model_type == "gemma2" else 0.0,
            logit_cap=(config.final_logit_softcapping or 0.0) if scaled else 0.0,
            gelu=scaled,
            pages=self.pages.count,
        )
        for i in range(shape.layers):
            rotation = list(turns).index(config.layer_types[i]) if shape.family.rope_by_type else 0
            self._add_layer(i, rotation)

    def keep(self, caches: Sequence[LayerCache]) -> None:
        """How each layer keeps keys and values from now on, float32 before the first call; what was kept is lost."""
        for layer, cache in enumerate(caches):
            self._decoder.keep(layer, cache.kind, *cache.scales)
        self.pages.forget()

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of one token in all layers; of int2, in a page that is full."""
        return int(self._decoder.cache_bytes)

    @property
    def open_page_bytes(self) -> int:
        """Bytes that each sequence's last page takes besides, until it is full; 0 without int2."""
        return int(self._decoder.open_page_bytes)

    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits (wanted rows, vocabulary) float32 of the chunks, which are computed together, in order."""
        width = max(len(chunk.pages) for chunk in chunks)
        starts = itertools.accumulate((len(chunk.tokens) for chunk in chunks), initial=0)
        rows = [start + row for start, chunk in zip(starts, chunks, strict=False) for row in chunk.rows]
        logits = torch.empty(len(rows), self.shape.vocabulary)
        self._decoder.step(
            _words([token for chunk in chunks for token in chunk.tokens]),
            _words([chunk.position + i for chunk in chunks for i in range(len(chunk.tokens))]),
            _words([number for number, chunk in enumerate(chunks) for _ in chunk.tokens]),
            _words([[*chunk.pages, *[0] * (width - len(chunk.pages))] for chunk in chunks]),
            _words([chunk.long for chunk in chunks]),
            _words(rows),
            logits,
            self.eight_bit,
            torch.get_num_threads(),
        )
        return logits

    def layers(self, kernel: str) -> list[LayerUse]:
        """Every linear with its kernel and its bytes, the head last."""
        return [
            LayerUse(
                name=name,
                aliases=(EMBEDDING,) if name == HEAD and self.shape.tied else (),
                kernel=f"{kernel} {weight_name(self._scheme(name), parts[0].bits)} x {self._inputs(name, parts[0])}",
                weights=sum(part.rows * part.columns for part in parts)
                + (sum(part.rows for part in parts) if f"{name}.bias" in self._checkpoint.index else 0),
                held_bytes=(held := sum(part.nbytes for part in parts)),
                read_bytes=held * self.shape.chosen // self.shape.experts if ".experts." in name else held,
            )
            for name, parts in sorted(self.linears.items(), key=lambda item: item[0] == HEAD)
        ]

    def _scheme(self, name: str) -> Scheme | None:
        """Of a linear's weight; the head's is the embedding's where they are one."""
        return self.shape.schemes.get(EMBEDDING if name == HEAD and self.shape.tied else name)

    def _inputs(self, name: str, linear: Any) -> str:
        if self.eight_bit and linear.takes_eight_bit:
            return "int8"
        return input_name(self._scheme(name))

    def _add_layer(self, i: int, rotation: int) -> None:
        names = self.shape.layer(i)
        made = {
            part: packed
            for name in dict.fromkeys(part.linear for parts in (names.attention, *names.experts) for part in parts)
            for part, packed in self._parts(name, names).items()
        }
        self._decoder.add_layer(
            attention=[made[part] for part in names.attention],
            gates=[made[gate] for gate, _, _ in names.experts],
            ups=[made[up] for _, up, _ in names.experts],
            downs=[made[down] for _, _, down in names.experts],
            router=self._linear(names.router) if names.router is not None else None,
            chosen=self.shape.chosen,
            renormalise=bool(getattr(self.shape.config, "norm_topk_prob", True)),
            window=self.shape.windows[i],
            rotation=rotation,
            **{kind: None if name is None else self._norm(name) for kind, name in names.norms.items()},
        )

    def _norm(self, name: str) -> Tensor:
        weight = self._checkpoint.read(f"{name}.weight").float()
        return (weight + 1 if self.shape.family.offset_norms else weight).contiguous()

    def _head(self, embedding: Any) -> Any:
        """embedding: packed, or None where it is dense."""
        if not self.shape.tied:
            return self._linear(HEAD)
        if embedding is None:
            assert self._embedding is not None
            embedding = packed_linear.pack_dense(self._embedding, eight_bit=self.eight_bit)
        self.linears[HEAD] = [embedding]
        return embedding

    def _linear(self, name: str) -> Any:
        """A stored linear as a whole."""
        (packed,) = self.linears[name] = self._pack(name, self._sizes[name])
        return packed

    def _parts(self, name: str, names: LayerNames) -> dict[Part, Any]:
        """A stored linear's parts, each repacked on its own."""
        parts = [part for group in (names.attention, *names.experts) for part in group if part.linear == name]
        self.linears[name] = self._pack(name, self._sizes[name], parts)
        return dict(zip(parts, self.linears[name], strict=True))

    def _pack(self, name: str, size: tuple[int, int], parts: Sequence[Part] = ()) -> list[Any]:
        """A weight of this size (out, in) repacked for the products, with its bias: its parts, or all of it."""
        read, index = self._checkpoint.read, self._checkpoint.index
        rows = [slice(part.start, part.end) for part in parts] or [slice(0, size[0])]
        bias = read(f"{name}.bias") if f"{name}.bias" in index else None
        scheme = self.shape.schemes.get(name)
        if scheme is None:
            weight, eight_bit = read(f"{name}.weight"), self.eight_bit and name == HEAD
            return [packed_linear.pack_dense(weight[part], _rows(bias, part), eight_bit) for part in rows]
        stored = Stored(self._checkpoint, self.shape.format, name, size, scheme)
        return [stored.pack(part, bias) for part in rows]


def _words(numbers: Sequence[object]) -> np.ndarray:
    """By numpy, which takes a fraction of what small torch tensors take: that counts at one token a step."""
    return np.array(numbers, dtype=np.int32)


def _rows(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]

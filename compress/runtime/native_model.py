"""The native decoder of a checkpoint: weights repacked once, and a whole step as one native call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.errors import IntegrityError
from compress.formats.int_packed import pack_bits, unpack_bits
from compress.kernels import packed_linear
from compress.kernels.dispatch import native
from compress.models.checkpoint import Checkpoint
from compress.runtime.native_reader import stored_parts
from compress.runtime.native_shape import ATTENTION, EMBEDDING, FINAL_NORM, HEAD, MLP, Shape
from compress.runtime.pages import PagePool
from compress.runtime.protocol import LayerUse

STEP_TOKENS = 512  # tokens of one call: what is between the products stays in the cache
_LEAST_CACHE_TOKENS, _MOST_CACHE_TOKENS = 16_384, 32_768


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence at consecutive positions, and the indices among them whose logits are wanted."""

    tokens: Sequence[int]
    position: int
    pages: Sequence[int]
    rows: Sequence[int]


class NativeModel:
    """A decoder of the Llama family over packed, bfloat16 or float32 weights."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        shape: Shape,
        eight_bit: bool,
        cache_tokens: int | None = None,
        kv_cache: str = "float32",
    ) -> None:
        """eight_bit: inputs of packed linears are rounded to 8 bits, and a dense head is packed in 8 bits.

        kv_cache: how keys and values are kept: `float32`, `bfloat16`, `int8` or `int4`.
        cache_tokens: room of the key-value cache, all sequences together; memory is taken as it is needed. None: the
        model's context, but 16,384 at least and 32,768 at most.

        Raises:
            IntegrityError: a packed weight whose stored shape contradicts the config.
        """
        self.shape = shape
        self.eight_bit = eight_bit
        self._checkpoint = checkpoint
        self.linears: dict[str, Any] = {}
        native_module = native()
        if cache_tokens is None:
            context = shape.config.max_position_embeddings
            cache_tokens = max(_LEAST_CACHE_TOKENS, min(context, _MOST_CACHE_TOKENS))
        self.pages = PagePool(-(-cache_tokens // native_module.PAGE_TOKENS) + 1, native_module.PAGE_TOKENS)
        frequencies, factor = _rotation(shape.config)
        self._embedding: Tensor | None = None
        packed = None
        if EMBEDDING in shape.schemes:
            packed = self._pack(EMBEDDING, (shape.vocabulary, shape.hidden))
        else:
            embedding = checkpoint.read(f"{EMBEDDING}.weight")
            self._embedding = embedding.float() if embedding.dtype == torch.float16 else embedding
        self._decoder = native_module.Decoder(
            self._embedding,
            packed,
            self._vector(FINAL_NORM),
            self._head(packed),
            frequencies,
            factor,
            shape.heads,
            shape.kv_heads,
            shape.config.rms_norm_eps,
            kv_cache,
            self.pages.count,
        )
        for i in range(shape.layers):
            self._add_layer(f"model.layers.{i}", shape.windows[i])

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of one token in all layers."""
        return int(self._decoder.cache_bytes)

    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits (wanted rows, vocabulary) float32 of the chunks, which are computed together, in order."""
        count = sum(len(chunk.tokens) for chunk in chunks)
        tokens, positions, sequences = torch.empty(3, count, dtype=torch.int32).unbind(0)
        tables = torch.zeros(len(chunks), max(len(chunk.pages) for chunk in chunks), dtype=torch.int32)
        rows: list[int] = []
        start = 0
        for number, chunk in enumerate(chunks):
            end = start + len(chunk.tokens)
            tokens[start:end] = torch.tensor(chunk.tokens, dtype=torch.int32)
            positions[start:end] = torch.arange(chunk.position, chunk.position + end - start, dtype=torch.int32)
            sequences[start:end] = number
            tables[number, : len(chunk.pages)] = torch.tensor(chunk.pages, dtype=torch.int32)
            rows += [start + row for row in chunk.rows]
            start = end
        logits = torch.empty(len(rows), self.shape.vocabulary)
        wanted = torch.tensor(rows, dtype=torch.int32)
        self._decoder.step(
            tokens, positions, sequences, tables, wanted, logits, self.eight_bit, torch.get_num_threads()
        )
        return logits

    def sequence(self, tokens: Sequence[int], position: int, pages: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Logits (rows, vocabulary) of one sequence's next tokens, in steps of STEP_TOKENS; rows in ascending order."""
        found = []
        for start in range(0, len(tokens), STEP_TOKENS):
            part = tokens[start : start + STEP_TOKENS]
            inside = [row - start for row in rows if start <= row < start + len(part)]
            found.append(self.step([Chunk(part, position + start, pages, inside)]))
        return found[0] if len(found) == 1 else torch.cat(found)

    def layers(self, kernel: str) -> list[LayerUse]:
        """Every linear with its kernel and its bytes, the head last."""
        return [
            LayerUse(
                name=name,
                aliases=(EMBEDDING,) if name == HEAD and self.shape.tied else (),
                kernel=f"{kernel} {_weights(linear.bits)} x {self._inputs(linear.bits)}",
                weights=linear.rows * linear.columns + (linear.rows if f"{name}.bias" in self._checkpoint.index else 0),
                held_bytes=linear.nbytes,
                read_bytes=linear.nbytes,
            )
            for name, linear in sorted(self.linears.items(), key=lambda item: item[0] == HEAD)
        ]

    def _inputs(self, bits: int) -> str:
        return "int8" if self.eight_bit and bits <= 8 else "float32"

    def _add_layer(self, prefix: str, window: int) -> None:
        linears = [self._linear(f"{prefix}.self_attn.{name}") for name in ATTENTION]
        linears += [self._linear(f"{prefix}.mlp.{name}") for name in MLP]
        norms = [self._vector(f"{prefix}.{name}") for name in ("input_layernorm", "post_attention_layernorm")]
        of_heads = [f"{prefix}.self_attn.{name}" for name in ("q_norm", "k_norm")]
        heads = [self._vector(name) if self.shape.head_norms else None for name in of_heads]
        self._decoder.add_layer(*linears, *norms, *heads, window)

    def _vector(self, name: str) -> Tensor:
        return self._checkpoint.read(f"{name}.weight").float().contiguous()

    def _head(self, embedding: Any) -> Any:
        """embedding: packed, or None where it is dense."""
        if not self.shape.tied:
            return self._linear(HEAD)
        if embedding is None:
            assert self._embedding is not None
            embedding = packed_linear.pack_dense(self._embedding, eight_bit=self.eight_bit)
        self.linears[HEAD] = embedding
        return embedding

    def _linear(self, name: str) -> Any:
        self.linears[name] = self._pack(name, self.shape.linears()[name])
        return self.linears[name]

    def _pack(self, name: str, size: tuple[int, int]) -> Any:
        """A weight of this size (out, in) repacked for the products, with its bias."""
        read, index = self._checkpoint.read, self._checkpoint.index
        bias = read(f"{name}.bias") if f"{name}.bias" in index else None
        scheme = self.shape.schemes.get(name)
        if scheme is None:
            return packed_linear.pack_dense(read(f"{name}.weight"), bias, eight_bit=self.eight_bit and name == HEAD)
        out, columns = size
        if self.shape.format.layout is not None:
            found = self.shape.format.unpack(stored_parts(self._checkpoint, name, self.shape.format), scheme)
            words = pack_bits(found.codes, scheme.bits)
            return packed_linear.pack_codes(words, found.scale, found.zero_point, columns, scheme, bias)
        if read(f"{name}.weight_shape").tolist() != [out, columns]:
            raise IntegrityError(
                f"{name}.weight_shape is not {(out, columns)}", "run `compress verify` on the artifact"
            )
        zero = None
        if not scheme.symmetric:
            zero = unpack_bits(read(f"{name}.weight_zero_point").T, scheme.bits, out).T
        words, scale = read(f"{name}.weight_packed"), read(f"{name}.weight_scale")
        return packed_linear.pack_codes(words, scale, zero, columns, scheme, bias)


def _weights(bits: int) -> str:
    return {16: "bfloat16", 32: "float32"}.get(bits, f"int{bits}")


def _rotation(config: Any) -> tuple[Tensor, float]:
    """(frequencies (head_dim / 2) float32, factor of the cosines and sines), as transformers computes them."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary: Any = LlamaRotaryEmbedding(config)
    return rotary.inv_freq.float().contiguous(), float(rotary.attention_scaling)

"""A decoder over pages of keys and values, as the engine, the scorer and the choice of a cache see it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from compress.runtime.cache_choice import LayerCache
from compress.runtime.native_shape import Shape
from compress.runtime.pages import PagePool

STEP_TOKENS = 512  # tokens of one call: what is between the products stays in the cache
_LEAST_CACHE_TOKENS, _MOST_CACHE_TOKENS = 16_384, 32_768


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence at consecutive positions, and the indices among them whose logits are wanted.

    long: the sequence is turned as those are that grow longer than the model's first context (`PagedModel.long`).
    """

    tokens: Sequence[int]
    position: int
    pages: Sequence[int]
    rows: Sequence[int]
    long: bool = False


class PagedModel(ABC):
    """What computes chunks. `caches`: kinds of caches that it keeps, the one that loses nothing first.

    step_tokens: how many tokens a step computes at most.
    """

    shape: Shape
    pages: PagePool
    caches: tuple[str, ...]
    step_tokens = STEP_TOKENS

    @property
    def first_context(self) -> int | None:
        """Where LongRoPE's short factors end; None for other rotations."""
        rope = self.shape.config.rope_parameters or {}
        return rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else None

    def long(self, length: int) -> bool:
        """Whether a sequence that grows so long is turned by the long factors of LongRoPE, from its first token on."""
        return self.first_context is not None and length > self.first_context

    @property
    @abstractmethod
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of one token in all layers; of int2, in a page that is full."""

    @property
    def open_page_bytes(self) -> int:
        """Bytes that each sequence's last page takes besides, until it is full; 0 without int2."""
        return 0

    @property
    def reserved_bytes(self) -> int:
        """Bytes of memory that pages take before anything is kept in them; 0 where they take it as they fill."""
        return 0

    @abstractmethod
    def keep(self, caches: Sequence[LayerCache]) -> None:
        """How each layer keeps keys and values from now on; what was kept is lost."""

    @abstractmethod
    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits (wanted rows, vocabulary) float32 of the chunks, which are computed together, in order."""

    def sequence(
        self,
        tokens: Sequence[int],
        position: int,
        pages: Sequence[int],
        rows: Sequence[int],
        length: int | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Logits (rows, vocabulary) of one sequence's next tokens, in steps of `step_tokens`; rows in ascending order.

        length: of the whole sequence in the end; with these tokens if None. out: where they are written; new if None.
        """
        long = self.long(position + len(tokens) if length is None else length)
        return self.in_steps(Chunk(tokens, position, pages, rows, long), out)

    def in_steps(self, chunk: Chunk, out: Tensor | None = None) -> Tensor:
        """Logits (rows, vocabulary) of a chunk of any length, in steps of `step_tokens`; rows, out as in `sequence`."""
        count, done = len(chunk.tokens), 0
        for start in range(0, count, self.step_tokens):
            part = chunk.tokens[start : start + self.step_tokens]
            inside = [row - start for row in chunk.rows if start <= row < start + len(part)]
            logits = self.step([Chunk(part, chunk.position + start, chunk.pages, inside, chunk.long)])
            if out is None:
                out = logits if len(part) == count else logits.new_empty(len(chunk.rows), logits.shape[1])
            if out is not logits:
                out[done : done + len(logits)] = logits
            done += len(logits)
        assert out is not None
        return out


def default_cache_tokens(context: int) -> int:
    """Room of a cache where none is asked for: the model's context, but 16,384 at least and 32,768 at most."""
    return max(_LEAST_CACHE_TOKENS, min(context, _MOST_CACHE_TOKENS))

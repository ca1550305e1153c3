"""What a step on a GPU reads besides weights and pages, in one buffer of whole numbers: a single copy to the device."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from compress.kernels.triton.attention import BLOCK_QUERIES
from compress.kernels.triton.cache import PAGE
from compress.runtime.paged_model import Chunk

_LEAST_PAGES = 8
_ALIGNED = 4  # int32 numbers in 16 bytes
_EMPTY = Chunk([0], 0, [0], [])


class Inputs:
    """Sequences with one new token first, then those with several, whose tokens are cut into blocks (`blocked`: all).

    tokens, positions, slots, long (tokens,) int32: ids, places in their sequences, places in the cache (negative: not
    kept), whether turned by LongRoPE's long factors. lengths (singles,): tokens of each sequence with one new token.
    tables (sequences, pages): their pages. blocks (blocks, 4) as `chunk_attention` wants them. Each begins at a
    multiple of 16 bytes, whatever the numbers, as kernels are compiled for.
    """

    def __init__(self, flat: Tensor, tokens: int, singles: int, sequences: int, pages: int, blocks: int) -> None:
        """flat: all of them, one after the other, each padded to 16 bytes; the rest says how many of each."""
        self.flat, self.singles = flat, singles
        self._sizes = tokens, singles, sequences, pages, blocks
        sizes = [tokens] * 4 + [singles, sequences * pages, blocks * 4]
        padded = flat.split([size + -size % _ALIGNED for size in sizes])
        parts = [part[:size] for part, size in zip(padded, sizes, strict=True)]
        self.tokens, self.positions, self.slots, self.long, self.lengths = parts[:5]
        self.tables, self.blocks = parts[5].view(sequences, pages), parts[6].view(blocks, 4)

    def to(self, device: torch.device) -> Inputs:
        """A copy on a device."""
        return Inputs(self.flat.to(device, copy=True), *self._sizes)


def pages_of(chunks: Sequence[Chunk]) -> int:
    """Pages of a table that holds what the chunks see: a power of two, so that few widths occur."""
    most = max(chunk.position + len(chunk.tokens) for chunk in chunks)
    return max(_LEAST_PAGES, 1 << (-(-most // PAGE) - 1).bit_length())


def inputs_of(chunks: Sequence[Chunk], singles: int | None = None, blocked: bool = False) -> Inputs:
    """Inputs on the CPU of chunks, those of one token first.

    singles: sequences with one new token that there is room for; places that no chunk takes see one token of page 0,
    and keep nothing. blocked: a single token is a block too.
    """
    alone = sum(len(chunk.tokens) == 1 for chunk in chunks)
    empty = 0 if singles is None else singles - alone
    width = pages_of(chunks)
    tokens, positions, slots, long, lengths, tables, blocks = (array("i") for _ in range(7))

    def add(chunk: Chunk) -> None:
        places = range(chunk.position, chunk.position + len(chunk.tokens))
        tokens.extend(chunk.tokens)
        positions.extend(places)
        slots.extend([chunk.pages[place // PAGE] * PAGE + place % PAGE for place in places])
        long.extend([int(chunk.long)] * len(places))
        tables.extend(chunk.pages[:width])
        tables.extend([0] * (width - len(chunk.pages)))

    for chunk in (*chunks[:alone], *[_EMPTY] * empty):
        if blocked:
            blocks.extend([len(lengths), len(tokens), 1, chunk.position])
        add(chunk)
        lengths.append(chunk.position + 1)
        if chunk is _EMPTY:
            slots[-1] = -1
    for row, chunk in enumerate(chunks[alone:], alone + empty):
        first, count = len(tokens), len(chunk.tokens)
        add(chunk)
        for start in range(0, count, BLOCK_QUERIES):
            blocks.extend([row, first + start, min(BLOCK_QUERIES, count - start), chunk.position + start])
    sizes = len(tokens), alone + empty, len(chunks) + empty, width, len(blocks) // 4
    flat = array("i")
    for part in (tokens, positions, slots, long, lengths, tables, blocks):
        flat.extend(part)
        flat.extend([0] * (-len(part) % _ALIGNED))
    return Inputs(torch.frombuffer(flat, dtype=torch.int32), *sizes)

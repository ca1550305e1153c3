"""What a step on a GPU reads besides weights and pages, in one buffer of whole numbers: a single copy to the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compress.kernels.triton.attention import BLOCK_QUERIES
from compress.kernels.triton.cache import PAGE
from compress.runtime.paged_model import Chunk

_LEAST_PAGES = 8


class Inputs:
    """Sequences with one new token first, then those with several, whose tokens are cut into blocks.

    tokens, positions, slots, long (tokens,) int32: ids, places in their sequences, places in the cache (negative: not
    kept), whether turned by LongRoPE's long factors. lengths (singles,): tokens of each sequence with one new token.
    tables (sequences, pages): their pages. blocks (blocks, 4) as `chunk_attention` wants them.
    """

    def __init__(
        self, tokens: int, singles: int, sequences: int, pages: int, blocks: int, device: torch.device | str = "cpu"
    ) -> None:
        self.singles = singles
        self._sizes = tokens, singles, sequences, pages, blocks
        sizes = [tokens] * 4 + [singles, sequences * pages, blocks * 4]
        self.flat = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        parts = self.flat.split(sizes)
        self.tokens, self.positions, self.slots, self.long, self.lengths = parts[:5]
        self.tables, self.blocks = parts[5].view(sequences, pages), parts[6].view(blocks, 4)

    def to(self, device: torch.device) -> Inputs:
        """A copy on a device."""
        copy = Inputs(*self._sizes, device)
        copy.flat.copy_(self.flat)
        return copy


def pages_of(chunks: Sequence[Chunk]) -> int:
    """Pages of a table that holds what the chunks see: a power of two, so that few widths occur."""
    most = max(chunk.position + len(chunk.tokens) for chunk in chunks)
    return max(_LEAST_PAGES, 1 << (-(-most // PAGE) - 1).bit_length())


def inputs_of(chunks: Sequence[Chunk], singles: int | None = None) -> Inputs:
    """Inputs on the CPU of chunks, those of one token first.

    singles: sequences with one new token that there is room for; places that no chunk takes see one token of page 0,
    and keep nothing.
    """
    alone = sum(len(chunk.tokens) == 1 for chunk in chunks)
    empty = 0 if singles is None else singles - alone
    blocks = [block for row, chunk in enumerate(chunks[alone:], alone + empty) for block in _blocks(row, chunk)]
    first = alone + empty
    for block in blocks:  # tokens of sequences with several follow all single ones
        block[1] = first
        first += block[2]
    found = Inputs(first, alone + empty, len(chunks) + empty, pages_of(chunks), len(blocks))
    for (start, end), part in (((0, alone), chunks[:alone]), ((alone + empty, first), chunks[alone:])):
        columns = [_tokens(chunk) for chunk in part]
        for number, field in enumerate((found.tokens, found.positions, found.slots, found.long)):
            values = [value for column in columns for value in column[number]]
            field[start:end] = torch.tensor(values, dtype=torch.int32)
    found.slots[alone : alone + empty] = -1
    lengths = [chunk.position + 1 for chunk in chunks[:alone]] + [1] * empty
    found.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
    for number, chunk in enumerate(chunks):
        pages = chunk.pages[: found.tables.shape[1]]
        row = number if number < alone else number + empty
        found.tables[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
    if blocks:
        found.blocks.copy_(torch.tensor(blocks, dtype=torch.int32))
    return found


def _blocks(row: int, chunk: Chunk) -> list[list[int]]:
    """Of a chunk's tokens: row of the tables, 0, how many, position of the first."""
    count = len(chunk.tokens)
    return [
        [row, 0, min(BLOCK_QUERIES, count - start), chunk.position + start] for start in range(0, count, BLOCK_QUERIES)
    ]


def _tokens(chunk: Chunk) -> tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]:
    """Ids, positions, slots and whether turned by long factors of a chunk's tokens."""
    positions = range(chunk.position, chunk.position + len(chunk.tokens))
    slots = [chunk.pages[position // PAGE] * PAGE + position % PAGE for position in positions]
    return chunk.tokens, positions, slots, [int(chunk.long)] * len(slots)

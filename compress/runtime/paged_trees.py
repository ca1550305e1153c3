"""Logits at the nodes of prefix trees over pages, several trees side by side.

A node's keys and values lie at its depth. In depth-first order those at smaller depths are its ancestors', so a chain
is computed like the end of a plain sequence and overwrites the branch before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from compress.runtime.continuations import Row
from compress.runtime.paged_model import PagedModel
from compress.runtime.paged_sequence import PagedSequence


def together(model: PagedModel, rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The rows in order, as many at a time as one step and the free pages hold, and one at least.

    Pages that are computed again from their first token on (`PagedModel.open_page_bytes`) belong to rows by themselves.
    """
    group: list[Row] = []
    tokens = pages = 0
    for row in rows:
        own = model.pages.pages_for(_length(row))
        if group and (
            model.open_page_bytes or tokens + len(row.tokens) > model.step_tokens or pages + own > model.pages.free
        ):
            yield group
            group, tokens, pages = [], 0, 0
        group.append(row)
        tokens, pages = tokens + len(row.tokens), pages + own
    if group:
        yield group


def tree_logits(model: PagedModel, rows: Sequence[Row], nodes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits (nodes, vocabulary) at the given nodes of each row, in ascending order; rows of one group of `together`.

    The first chains of all rows are one step, then the second ones, and so on.
    """
    found: list[list[Tensor]] = [[] for _ in rows]
    with ExitStack() as lent:
        lengths = [_length(row) for row in rows]
        sequences = [PagedSequence(model, lent.enter_context(model.pages.lend(length)), length) for length in lengths]
        chains = [list(_chains(row.depths)) for row in rows]
        for turn in range(max(map(len, chains))):
            owners = [number for number, own in enumerate(chains) if turn < len(own)]
            chunks = []
            for number in owners:
                row, (start, end) = rows[number], chains[number][turn]
                inside = [node - start for node in nodes[number] if start <= node < end]
                sequences[number].rewind(row.depths[start])
                chunks.append(sequences[number].chunk(row.tokens[start:end], inside))
            logits = model.step(chunks) if len(chunks) > 1 else model.in_steps(chunks[0])
            for number, part in zip(owners, logits.split([len(chunk.rows) for chunk in chunks]), strict=True):
                found[number].append(part)
    return [torch.cat(parts) for parts in found]


def _length(row: Row) -> int:
    return max(row.depths) + 1


def _chains(depths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """[start, end) of each run of nodes that are each the child of the one before."""
    start = 0
    for node in range(1, len(depths) + 1):
        if node == len(depths) or depths[node] != depths[node - 1] + 1:
            yield start, node
            start = node

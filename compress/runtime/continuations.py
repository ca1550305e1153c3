"""Which tokens to score together: continuations of contexts, with what they share computed once.

Choices of one question share its text, the two halves of a minimal pair their beginning, questions of one kind the
examples before them. Sorted as token sequences, neighbours share the longest beginnings, so a row of a batch holds a
prefix tree: its tokens in depth-first order, each attending to its ancestors alone (tree attention, Cai et al.,
Medusa, 2024, section 3). Sequences that share nothing become rows of their own and need no mask.

The plan depends on the requests alone, never on what a cache holds, so that a resumed evaluation computes the same
batches and gives the same bits. Free of torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Continuation:
    """Tokens to score: those of `token_ids` from `start` (at least 1) on, each given all that stand before it."""

    token_ids: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Log-likelihood in nats of a continuation's tokens, summed; `greedy`: each was the likeliest in its place."""

    total: float
    greedy: bool


@dataclass(frozen=True, slots=True)
class Read:
    """The probability of `target` as predicted at `node` of a row belongs to request number `request`."""

    node: int
    target: int
    request: int


@dataclass(frozen=True, slots=True)
class Row:
    """A prefix tree as one row of token ids, in depth-first order.

    depths: each node's distance from the root, its position in the text. ends: one past the last node below it, so
    node j attends to node i where i <= j < ends[i].
    """

    tokens: tuple[int, ...]
    depths: tuple[int, ...]
    ends: tuple[int, ...]
    reads: tuple[Read, ...]

    @property
    def branches(self) -> bool:
        """Whether some node has two children; a row that does not is a plain sequence."""
        return self.depths[-1] + 1 < len(self.depths)

    @property
    def scored(self) -> int:
        """Nodes whose prediction is read: the rows of logits that are needed."""
        return len({read.node for read in self.reads})


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows computed in one forward pass, and the requests, in ascending order, that they answer."""

    rows: tuple[Row, ...]
    requests: tuple[int, ...]

    @property
    def branches(self) -> bool:
        """Whether the rows need tree attention."""
        return self.rows[0].branches


def plan(
    requests: Sequence[Continuation],
    *,
    batch_tokens: int,
    scored_tokens: int,
    hidden: int,
    tree_depth: int | None,
    apart: int | None = None,
) -> list[Batch]:
    """Every request in exactly one batch.

    batch_tokens, scored_tokens: most tokens, padding counted, and most rows of logits of a batch; a single row may
    exceed both. hidden: the model's width, which sets what attention costs against all else. tree_depth: the longest
    sequence that may share a row's beginning with others; None: no sharing but of whole sequences. apart: longer
    sequences than this are in no row with others.
    """
    rows: list[Row] = []
    for long in (False, True):
        kept = [i for i, one in enumerate(requests) if (apart is not None and len(one.token_ids) - 1 > apart) == long]
        rows += _rows(requests, kept, batch_tokens, hidden, tree_depth)
    batches: list[Batch] = []
    for branches in (False, True):
        batches += _batches([row for row in rows if row.branches is branches], batch_tokens, scored_tokens)
    return batches


class _Tree:
    """A row that grows by sequences in lexicographic order."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.depths: list[int] = []
        self.ends: list[int] = []
        self.reads: list[Read] = []
        self.path: list[int] = []  # nodes from the root to the last one
        self.last: tuple[int, ...] = ()

    def shared(self, inputs: tuple[int, ...]) -> int:
        """How many tokens `inputs` shares with the sequence added last."""
        length = 0
        for ours, theirs in zip(self.last, inputs, strict=False):
            if ours != theirs:
                break
            length += 1
        return length

    def add(self, inputs: tuple[int, ...], index: int, request: Continuation) -> None:
        shared = self.shared(inputs)
        for node in self.path[shared:]:
            self.ends[node] = len(self.tokens)
        del self.path[shared:]
        for depth in range(shared, len(inputs)):
            self.path.append(len(self.tokens))
            self.tokens.append(inputs[depth])
            self.depths.append(depth)
            self.ends.append(0)
        self.last = inputs
        for position in range(request.start, len(request.token_ids)):
            self.reads.append(Read(self.path[position - 1], request.token_ids[position], index))

    def row(self) -> Row:
        for node in self.path:
            self.ends[node] = len(self.tokens)
        return Row(tuple(self.tokens), tuple(self.depths), tuple(self.ends), tuple(self.reads))


def _rows(
    requests: Sequence[Continuation], kept: Sequence[int], batch_tokens: int, hidden: int, tree_depth: int | None
) -> Iterator[Row]:
    tree: _Tree | None = None
    order = sorted(kept, key=lambda i: (requests[i].token_ids[:-1], requests[i].token_ids[-1:], i))
    for index in order:
        request = requests[index]
        inputs = request.token_ids[:-1]
        if tree is not None and not _joins(tree, inputs, batch_tokens, hidden, tree_depth):
            yield tree.row()
            tree = None
        tree = tree or _Tree()
        tree.add(inputs, index, request)
    if tree is not None:
        yield tree.row()


def _joins(tree: _Tree, inputs: tuple[int, ...], batch_tokens: int, hidden: int, tree_depth: int | None) -> bool:
    """Whether adding a sequence to a row is cheaper than a row of its own.

    It saves the shared tokens' way through the layers, about 12 hidden^2 multiplications each, and costs attention
    over a longer row, 2 hidden for each pair of tokens, which runs at about a third of a matrix product's speed.
    """
    shared, size = tree.shared(inputs), len(tree.tokens)
    fresh = len(inputs) - shared
    if shared == len(tree.last) and tree.depths[-1] + 1 == size:
        return True  # the same sequence again, or a longer one that begins with it
    if tree_depth is None or max(len(inputs), len(tree.last)) > tree_depth or size + fresh > batch_tokens:
        return False
    pairs = (size + fresh) ** 2 - size**2 - len(inputs) ** 2
    return 2 * hidden * shared > pairs


def _batches(rows: list[Row], batch_tokens: int, scored_tokens: int) -> Iterator[Batch]:
    """Rows of like length together, the longest first, so that running out of memory shows at once."""
    rows = sorted(rows, key=lambda row: -len(row.tokens))
    start = 0
    while start < len(rows):
        width, end, scored = len(rows[start].tokens), start + 1, rows[start].scored
        while end < len(rows) and (end + 1 - start) * width <= batch_tokens:
            scored += rows[end].scored
            if scored > scored_tokens:
                break
            end += 1
        chosen = tuple(rows[start:end])
        yield Batch(chosen, tuple(sorted({read.request for row in chosen for read in row.reads})))
        start = end

"""The activations that flow from block to block, in chunks of a fixed number of tokens.

Chunks are the unit of parallel work and of summation; their size never depends on the machine, so neither do results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress.errors import WorkError
from compress.models.skeleton import Call, Skeleton

CHUNK_TOKENS = 4096
COMPARED_TOKENS, COMPARED_SHARE = 32768, 4
"""What the drift between the two models is estimated from: a quarter of the tokens, and no fewer than so many."""


def compared_tokens(tokens: int) -> int:
    """How many of a calibration's tokens also run through the original model, where a method asks for it."""
    chunks = math.ceil(tokens / CHUNK_TOKENS)
    return min(tokens, len(_compared(chunks, tokens)) * CHUNK_TOKENS)


def first_chunk(tokens: Tensor) -> Tensor:
    """The windows of calibration tokens (samples, seq) that run together first."""
    return tokens[: max(1, CHUNK_TOKENS // tokens.shape[1])]


def compared(skeleton: Skeleton, tokens: Tensor) -> Activations:
    """As `enter`, of the original model and of those chunks alone that a method compares the two models on."""
    batches = tokens.split(max(1, CHUNK_TOKENS // tokens.shape[1]))
    chosen = torch.cat([batches[place] for place in _compared(len(batches), tokens.numel())])
    return enter(skeleton, chosen, False)


def _compared(chunks: int, tokens: int) -> range:
    """The places of the chunks that both models see."""
    wanted = max(COMPARED_TOKENS, tokens // COMPARED_SHARE)
    return range(0, chunks, max(1, tokens // wanted))


@dataclass(frozen=True, eq=False)
class Activations:
    """Hidden states entering `block`: each chunk (samples, seq, hidden) in the compute dtype.

    quantized: through the blocks as quantised so far. original: some or all of the chunks, by their place, through the
    model as it was; none if no method asks. calls: for each chunk, how every block is called; single: the same for the
    first window alone. plain: the first chunk through the blocks as changed so far but not repaired, if a method asks.
    """

    block: int
    quantized: list[Tensor]
    original: Mapping[int, Tensor]
    calls: list[list[Call]]
    single: list[Call]
    plain: Tensor | None = None

    def state(self) -> dict[str, Tensor]:
        """The tensors that a resumed run needs."""
        quantized = {f"quantized.{place}": chunk for place, chunk in enumerate(self.quantized)}
        plain = {} if self.plain is None else {"plain": self.plain}
        return quantized | plain | {f"original.{place}": chunk for place, chunk in self.original.items()}

    def runs(self, skeleton: Skeleton, module: nn.Module) -> list[Callable[[], Tensor]]:
        """One callable per chunk that runs `module` as this block behind the blocks as quantised so far."""
        return [self._run(skeleton, module, place, hidden) for place, hidden in enumerate(self.quantized)]

    def original_runs(self, skeleton: Skeleton, module: nn.Module) -> list[Callable[[], Tensor]]:
        """The same for the chunks of `original`, behind the original blocks."""
        return [self._run(skeleton, module, place, hidden) for place, hidden in self.original.items()]

    def _run(self, skeleton: Skeleton, module: nn.Module, place: int, hidden: Tensor) -> Callable[[], Tensor]:
        return lambda: skeleton.run_block(module, hidden, self.calls[place][self.block])

    def standing_at(self, block: int, quantized: list[Tensor]) -> Activations:
        """These hidden states in place of its own, entering this block."""
        return replace(self, block=block, quantized=quantized)

    def advanced(self, quantized: list[Tensor], original: Sequence[Tensor] = ()) -> Activations:
        """The activations entering the next block, from the outputs of the runs.

        Raises WorkError if they are not finite.
        """
        for chunk in quantized:
            if not torch.isfinite(chunk.sum(dtype=torch.float32)):  # NaN and infinity survive a sum, and it is cheap
                raise WorkError(
                    f"block {self.block} produced NaN or infinite activations",
                    "the source model may overflow in this dtype; check it with `compress eval`",
                )
        kept = dict(zip(self.original, original, strict=True))
        return replace(self, block=self.block + 1, quantized=quantized, original=kept)


def enter(
    skeleton: Skeleton,
    tokens: Tensor,
    with_original: bool,
    throughout: bool = False,
    rows: Callable[[Tensor], Tensor] | None = None,
    with_plain: bool = False,
) -> Activations:
    """Embeds the calibration tokens (samples, seq): the activations entering block 0.

    with_original: whether some of them run through the original model too; throughout: whether all do. rows: of the
    quantised embedding, as `Skeleton.embed` takes them; None where the original's is kept. with_plain: whether the
    first chunk runs through the model changed but not repaired too.
    """
    hidden, calls = [], []
    batches = tokens.split(max(1, CHUNK_TOKENS // tokens.shape[1]))
    for batch in batches:
        states, block_calls = skeleton.embed(batch, rows)
        hidden.append(states)
        calls.append(block_calls)
    _, single = skeleton.embed(tokens[:1])
    places = range(0)
    if with_original:
        places = range(len(hidden)) if throughout else _compared(len(hidden), tokens.numel())
    original = {place: hidden[place] if rows is None else skeleton.embed(batches[place])[0] for place in places}
    return Activations(0, hidden, original, calls, single, hidden[0] if with_plain else None)


def resume(start: Activations, block: int, state: Mapping[str, Tensor]) -> Activations:
    """The activations of an earlier run, entering `block`. Shapes and calls are those of `start`."""
    quantized = [state[f"quantized.{place}"].clone() for place in range(len(start.quantized))]
    original = {place: state[f"original.{place}"].clone() for place in start.original}
    plain = None if start.plain is None else state["plain"].clone()
    return replace(start, block=block, quantized=quantized, original=original, plain=plain)

"""The activations that flow from block to block, in chunks of a fixed number of tokens.

Chunks are the unit of parallel work and of summation; their size never depends on the machine, so neither do results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress.errors import WorkError
from compress.models.skeleton import Call, Skeleton

CHUNK_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class Activations:
    """Hidden states entering `block`: each chunk (samples, seq, hidden) in the compute dtype.

    quantized: through the blocks as quantised so far. original: through the model as it was, or None if no method asks.
    calls: for each chunk, how every block is called; single: the same for the first window alone.
    """

    block: int
    quantized: list[Tensor]
    original: list[Tensor] | None
    calls: list[list[Call]]
    single: list[Call]

    def state(self) -> dict[str, Tensor]:
        """The tensors that a resumed run needs."""
        state = {"quantized": torch.cat(self.quantized)}
        if self.original is not None:
            state["original"] = torch.cat(self.original)
        return state

    def runs(self, skeleton: Skeleton, module: nn.Module, chunks: list[Tensor]) -> list[Callable[[], Tensor]]:
        """One callable per chunk that runs `module` as this block."""

        def bind(hidden: Tensor, call: Call) -> Callable[[], Tensor]:
            return lambda: skeleton.run_block(module, hidden, call)

        return [bind(hidden, calls[self.block]) for hidden, calls in zip(chunks, self.calls, strict=True)]

    def advanced(self, quantized: list[Tensor], original: list[Tensor] | None) -> Activations:
        """The activations entering the next block. Raises WorkError if they are not finite."""
        for chunk in quantized:
            if not torch.isfinite(chunk.sum(dtype=torch.float32)):  # NaN and infinity survive a sum, and it is cheap
                raise WorkError(
                    f"block {self.block} produced NaN or infinite activations",
                    "the source model may overflow in this dtype; check it with `compress eval`",
                )
        return replace(self, block=self.block + 1, quantized=quantized, original=original)


def enter(skeleton: Skeleton, tokens: Tensor, with_original: bool) -> Activations:
    """Embeds the calibration tokens (samples, seq): the activations entering block 0."""
    hidden, calls = [], []
    for batch in tokens.split(max(1, CHUNK_TOKENS // tokens.shape[1])):
        states, block_calls = skeleton.embed(batch)
        hidden.append(states)
        calls.append(block_calls)
    _, single = skeleton.embed(tokens[:1])
    return Activations(0, hidden, list(hidden) if with_original else None, calls, single)


def resume(start: Activations, block: int, state: Mapping[str, Tensor]) -> Activations:
    """The activations of an earlier run, entering `block`. Shapes and calls are those of `start`."""
    sizes = [chunk.shape[0] for chunk in start.quantized]

    def chunks(name: str) -> list[Tensor]:
        return [part.clone() for part in state[name].split(sizes)]

    original = chunks("original") if start.original is not None else None
    return replace(start, block=block, quantized=chunks("quantized"), original=original)

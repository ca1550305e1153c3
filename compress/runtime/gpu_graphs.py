"""Steps of one token per sequence, recorded once for a number of sequences and a width of their page tables.

A recorded step is a CUDA graph: its kernels are launched together, over buffers that stay where they are. Places that
no sequence takes are filled with tokens that keep nothing (`inputs_of`). Without CUDA the same step is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.errors import WorkError
from compress.runtime.gpu_inputs import Inputs, inputs_of, pages_of
from compress.runtime.paged_model import Chunk

BATCHES = (1, 2, 4, 8, 16, 32, 64)
"""Sequences that there are recorded steps for."""

Run = Callable[[Inputs], Tensor]
"""Logits (tokens, vocabulary) of inputs on the device, with nothing in it that depends on their values."""


class Recorded:
    """A function of buffers that stay: on CUDA captured as a graph and replayed, elsewhere called."""

    def __init__(self, function: Callable[[], Tensor], device: torch.device, pool: Any) -> None:
        """pool: memory that graphs share, since one runs at a time. The function runs before, to compile kernels.

        Raises:
            WorkError: it cannot be captured.
        """
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            try:
                self._record(device, pool)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise WorkError(
                    f"a step cannot be recorded as a CUDA graph: {str(error).splitlines()[0]}",
                    "use --kernel reference, and report this GPU and the versions that `compress doctor` lists",
                ) from error

    def _record(self, device: torch.device, pool: Any) -> None:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._function()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._result = self._function()

    def __call__(self) -> Tensor:
        """What the function gives on what the buffers hold now; a next call writes over it."""
        if self._graph is None:
            return self._function()
        self._graph.replay()
        return self._result


@dataclass(frozen=True, slots=True)
class _Step:
    inputs: Inputs
    recorded: Recorded


class DecodeSteps:
    """Recorded steps by sequences and pages, each made when it is first wanted."""

    def __init__(self, run: Run, device: torch.device, most: int = BATCHES[-1]) -> None:
        """most: sequences that `run` may be recorded for, at most; 0 for none."""
        self._run, self._device, self._most = run, device, min(most, BATCHES[-1])
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._steps: dict[tuple[int, int], _Step] = {}

    def takes(self, chunks: Sequence[Chunk]) -> bool:
        """Whether these are steps of one token each whose logits are all wanted, and not too many."""
        return len(chunks) <= self._most and all(len(chunk.tokens) == len(chunk.rows) == 1 for chunk in chunks)

    def __call__(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits (chunks, vocabulary)."""
        rows = next(size for size in BATCHES if size >= len(chunks))
        inputs = inputs_of(chunks, rows)
        step = self._steps.get((rows, pages_of(chunks)))
        if step is None:
            own = inputs.to(self._device)
            step = _Step(own, Recorded(lambda: self._run(own), self._device, self._pool))
            self._steps[rows, pages_of(chunks)] = step
        else:
            step.inputs.flat.copy_(inputs.flat)
        return step.recorded()[: len(chunks)].clone()

    def forget(self) -> None:
        """Records anew from now on: a buffer that steps read was replaced."""
        self._steps.clear()

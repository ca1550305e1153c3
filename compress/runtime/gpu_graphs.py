"""Steps of one token per sequence, recorded once for a number of sequences and a width of their page tables.

A recorded step is a CUDA graph: its kernels are launched together, over buffers that stay where they are. Places that
no sequence takes are filled with tokens that keep nothing (`inputs_of`). Without CUDA the same step is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import WorkError
from compress.runtime.gpu_inputs import Inputs, inputs_of, pages_of
from compress.runtime.paged_model import Chunk

BATCHES = (1, 2, 4, 8, 16, 32, 64)
"""Sequences that there are recorded steps for."""

Run = Callable[[Inputs], Tensor]
"""Logits (tokens, vocabulary) of inputs on the device, with nothing in it that depends on their values."""


class Recorder:
    """Records functions of buffers that stay, on one stream and in memory that they share, since one runs at a time.

    Elsewhere than on CUDA a recorded function is the function.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._device, self._stream, self._pool = device, torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The function as a graph: what it gives on what the buffers hold when it is replayed, in one place.

        It runs once before, which compiles kernels.

        Raises:
            WorkError: it cannot be captured.
        """
        if not self._cuda:
            return function
        try:
            return self._recorded(function)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise WorkError(
                f"a step cannot be recorded as a CUDA graph: {str(error).splitlines()[0]}",
                "use --kernel reference, and report this GPU and the versions that `compress doctor` lists",
            ) from error

    def _recorded(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            function()
        here.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            result = function()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


@dataclass(frozen=True, slots=True)
class _Step:
    inputs: Inputs
    recorded: Callable[[], Tensor]


class DecodeSteps:
    """Recorded steps by sequences and pages, each made when it is first wanted; all write logits into one buffer."""

    def __init__(self, run: Run, device: torch.device, most: int = BATCHES[-1], blocked: bool = False) -> None:
        """most: sequences that `run` may be recorded for, at most; 0 for none. blocked: as in `inputs_of`."""
        self._run, self._device, self._most, self._blocked = run, device, min(most, BATCHES[-1]), blocked
        self._logits: Tensor | None = None
        self.forget()

    def forget(self) -> None:
        """Records anew from now on: a buffer that steps read was replaced."""
        self._steps: dict[tuple[int, int], _Step] = {}
        self._recorder = Recorder(self._device)

    def takes(self, chunks: Sequence[Chunk]) -> bool:
        """Whether these are steps of one token each whose logits are all wanted, and not too many."""
        return len(chunks) <= self._most and all(len(chunk.tokens) == len(chunk.rows) == 1 for chunk in chunks)

    def __call__(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits (chunks, vocabulary)."""
        rows = next(size for size in BATCHES if size >= len(chunks))
        inputs = inputs_of(chunks, rows, self._blocked)
        step = self._steps.get((rows, pages_of(chunks)))
        if step is None:
            own = inputs.to(self._device)
            step = _Step(own, self._recorder(lambda: self._kept(own)))
            self._steps[rows, pages_of(chunks)] = step
        else:
            step.inputs.flat.copy_(inputs.flat)
        return step.recorded()[: len(chunks)].clone()

    def _kept(self, inputs: Inputs) -> Tensor:
        """A step's logits in the buffer of all, which the first step of all makes before it is recorded."""
        logits = self._run(inputs)
        if self._logits is None:
            self._logits = logits.new_empty(BATCHES[-1], logits.shape[1])
        return self._logits[: len(logits)].copy_(logits)

"""A block's forward over all calibration chunks at once, paused at the input of every watched linear.

Every chunk runs in a thread of its own. A hook stops each thread when it reaches a watched linear; once all threads
have stopped or finished, the caller sees the inputs of that linear over all chunks, may change its weight, and lets
them go on. So one pass through the block gives every linear its statistics behind already quantised predecessors
(true sequential order), and the block's output besides; nothing is traced and no forward is rebuilt.

At most `workers` threads compute at a time. Arithmetic of a chunk happens on one thread, so results do not depend on
how many there are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.errors import WorkError


@dataclass(frozen=True, eq=False, slots=True)
class Stage:
    """One linear reached: its name and the inputs (tokens, in) of the chunks that reached it, in chunk order.

    `same_input` says that these are the inputs of the stage before, as with q, k and v.
    """

    name: str
    inputs: list[Tensor]
    same_input: bool


class _Aborted(BaseException):
    """Raised inside a chunk's thread to end it when another part of the run failed."""


def _start(threads: Sequence[threading.Thread]) -> None:
    for number, thread in enumerate(threads):
        try:
            thread.start()
        except RuntimeError as error:
            raise WorkError(
                f"the system started {number} of the {len(threads)} threads that the calibration text needs: {error}",
                "lower --samples, or raise the limit on processes (ulimit -u)",
            ) from error


class StagedForward:
    """Iterate to meet the stages in order of execution; afterwards `outputs` holds each chunk's result.

    Args:
        runs: one callable per chunk, returning the block's output for it.
        watched: modules to stop at, by name, in the order the block defines them (it decides which of two linears
            comes first when chunks disagree, as they do on experts that not every chunk reaches).
        workers: how many chunks compute at the same time.
    """

    def __init__(self, runs: Sequence[Callable[[], Tensor]], watched: Mapping[str, nn.Module], workers: int) -> None:
        self._runs = runs
        self._watched = watched
        self._rank = {name: rank for rank, name in enumerate(watched)}
        self._permits = threading.Semaphore(workers)
        self._changed = threading.Condition()
        self._waiting: dict[int, tuple[str, Tensor]] = {}
        self._released: set[int] = set()
        self._running = 0
        self._failure: BaseException | None = None
        self._local = threading.local()
        self._outputs: list[Tensor | None] = [None] * len(runs)

    @property
    def outputs(self) -> list[Tensor]:
        """The block's output of every chunk; only once iteration has ended."""
        return [output for output in self._outputs if output is not None]

    def __iter__(self) -> Iterator[Stage]:
        handles = [
            module.register_forward_pre_hook(self._hook(name), prepend=True) for name, module in self._watched.items()
        ]
        threads = [threading.Thread(target=self._chunk, args=(i,), daemon=True) for i in range(len(self._runs))]
        self._running = len(threads)
        previous: Tensor | None = None
        try:
            _start(threads)
            while (stage := self._next_stage(previous)) is not None:
                previous = stage.inputs[0]
                yield stage
                self._release(stage.name)
        finally:
            self._abort(threads)
            for handle in handles:
                handle.remove()
        if self._failure is not None:
            raise self._failure

    def resume(self, stage: Stage) -> None:
        """Lets the chunks go on behind this stage while the caller still works; otherwise the next step does it."""
        self._release(stage.name)

    def _next_stage(self, previous: Tensor | None) -> Stage | None:
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or self._running == 0)
            if self._failure is not None or not self._waiting:
                return None
            name = min((name for name, _ in self._waiting.values()), key=self._rank.__getitem__)
            inputs = [x for _, (at, x) in sorted(self._waiting.items()) if at == name]
        first = inputs[0]
        same = previous is not None and previous.data_ptr() == first.data_ptr() and previous.shape == first.shape
        return Stage(name, inputs, same and first.numel() > 0)

    def _release(self, name: str) -> None:
        with self._changed:
            for index in [index for index, (at, _) in self._waiting.items() if at == name]:
                del self._waiting[index]
                self._released.add(index)
                self._running += 1
            self._changed.notify_all()

    def _abort(self, threads: Sequence[threading.Thread]) -> None:
        with self._changed:
            if self._failure is None:  # chunks that still compute must not wait at their next stop either
                self._failure = _Aborted()
            self._changed.notify_all()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        if isinstance(self._failure, _Aborted):
            self._failure = None

    def _chunk(self, index: int) -> None:
        self._local.index = index
        self._permits.acquire()
        try:
            with torch.inference_mode():
                self._outputs[index] = self._runs[index]()
        except BaseException as error:  # handed to the iterating thread, which raises it
            with self._changed:
                self._failure = self._failure or error
        finally:
            self._permits.release()
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def pause(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            index = getattr(self._local, "index", None)
            if index is None:
                return
            x = args[0].reshape(-1, args[0].shape[-1])
            self._permits.release()
            try:
                with self._changed:
                    self._waiting[index] = (name, x)
                    self._running -= 1
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._failure is not None or index in self._released)
                    self._released.discard(index)
                    if self._failure is not None:
                        if self._waiting.pop(index, None) is not None:
                            self._running += 1
                        raise _Aborted
            finally:
                self._permits.acquire()

        return pause

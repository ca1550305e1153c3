"""Writes finished blocks in a thread of its own, so that hashing and fsync overlap with the next block's arithmetic.

At most one block waits to be written, and blocks are written in order: the journal is as if there were no thread, one
block later at worst.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch


class Committer:
    """Use it as a context manager; leaving it waits for the last block."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        self._last: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Begins `write` once the one before it is done; raises what that one raised."""
        self._finish()
        self._last = self._thread.submit(write)

    def _finish(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> Committer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)
        if error is None:
            self._finish()

"""Running out of memory, in the several ways torch says so, as the one error a user can act on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from compress.errors import WorkError

_CPU_ALLOCATOR = "can't allocate memory"


@contextmanager
def guarded(doing: str) -> Iterator[None]:
    """Raises WorkError where the block runs out of memory while `doing` something; other errors pass unchanged."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and _CPU_ALLOCATOR not in str(error):
            raise
        raise WorkError(
            f"out of memory while {doing}",
            "use shorter texts and fewer at once, compressed weights, or a machine with more memory",
        ) from error

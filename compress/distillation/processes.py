"""How many processes share a training: a setting of the whole process, as its number of threads is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_wanted = 1


def wanted() -> int:
    """The number that holds now."""
    return _wanted


@contextmanager
def shared_by(count: int) -> Iterator[None]:
    """Trainings inside are shared by so many processes."""
    global _wanted
    before, _wanted = _wanted, count
    try:
        yield
    finally:
        _wanted = before

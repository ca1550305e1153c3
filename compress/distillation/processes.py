"""How many processes share a training: a setting of the whole process, as its number of threads is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from compress.errors import UserError

LAUNCHED = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where `accelerate launch`, `torchrun` and MPI tell each process that they start how many it is one of."""

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


def refuse_launched() -> None:
    """Raises UserError where a launcher started this program several times: each would make the same artifact."""
    for name in LAUNCHED:
        count = os.environ.get(name, "").strip()
        if count.isdigit() and int(count) > 1:
            raise UserError(
                f"a launcher started compress {count} times at once ({name}), and all would make the same artifact",
                f"start it once, without the launcher; `--processes {count}` of `distill` and `run` shares a training",
            )

"""How many processes share a training: a setting of the whole process, as its number of threads is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from compress.errors import UserError

MEETING = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What `accelerate launch` and `torchrun` tell each process that they start, so that all can meet."""
LAUNCHED = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where they and MPI say how many there are."""

_wanted = 1
_joined = 1


def wanted() -> int:
    """The number that holds now."""
    return _wanted


def launched() -> int:
    """How many processes were launched that can meet, this one among them; 1 without a launcher."""
    count = os.environ.get("WORLD_SIZE", "")
    return int(count) if count.isdigit() and all(os.environ.get(name) for name in MEETING) else 1


def rank() -> int:
    """Of this process among those launched: 0 does the work, the others help where it shares a training."""
    return int(os.environ["RANK"]) if launched() > 1 else 0


def are_launched() -> bool:
    """Whether this is one of several launched processes that are used as one."""
    return _joined > 1


@contextmanager
def joined() -> Iterator[None]:
    """Inside, all launched processes share every training that may be shared."""
    global _joined
    before, _joined = _joined, launched()
    try:
        yield
    finally:
        _joined = before


@contextmanager
def shared_by(count: int) -> Iterator[None]:
    """Trainings inside are shared by so many processes, or by all that were launched.

    Raises UserError where both are said, and differ.
    """
    global _wanted
    if _joined > 1 and count not in (1, _joined):
        raise UserError(f"{_joined} processes were launched, and --processes says {count}", "leave --processes out")
    before, _wanted = _wanted, max(count, _joined)
    try:
        yield
    finally:
        _wanted = before


def refuse_launched() -> None:
    """Raises UserError where a launcher started this program several times, and each would make the same artifact."""
    for name in LAUNCHED:
        count = os.environ.get(name, "").strip()
        if count.isdigit() and int(count) > 1 and not 1 < _joined == _wanted:
            raise UserError(
                f"a launcher started compress {count} times at once ({name}), and all would make the same artifact",
                f"start it once, without the launcher; `--processes {count}` of `distill` and `run` shares a training, "
                "and these two can be launched by torchrun or accelerate",
            )

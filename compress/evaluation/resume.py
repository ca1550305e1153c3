"""Where an evaluation keeps what is finished, so that a killed one goes on. Free of torch.

A directory that the user names is kept: a baseline's answers serve every candidate after it. Otherwise the place is one
of our own, named after the command, and it is removed once the record is there: nothing stale is ever found.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compress.artifact import durable
from compress.artifact.canonical import sha256_json
from compress.artifact.lock import FileLock, LockedError
from compress.errors import WorkError
from compress.progress import NullProgress, Progress

VARIABLE = "COMPRESS_CACHE"


def cache_home() -> Path:
    """The user's cache directory of this program: COMPRESS_CACHE, XDG_CACHE_HOME/compress or ~/.cache/compress."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "compress"


@contextlib.contextmanager
def keeping(
    directory: str | Path | None, command: dict[str, Any], progress: Progress | None = None
) -> Iterator[Path | None]:
    """Gives the directory to keep finished answers in, and clears it away in the end if it is our own.

    directory: the one that the user names; None for our own, which `command` (plain data that tells this evaluation
    from others) names. An evaluation that fails leaves it for the next try. Where our own cannot be made, None is given
    and a warning says that a killed run will start over.

    Raises:
        WorkError: the directory that the user names cannot be made.
    """
    if directory is not None:
        path = Path(directory)
        with durable.guarded("create", path):
            path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    own = cache_home() / "eval" / sha256_json(command)[:32]
    try:
        with durable.guarded("create", own):
            own.mkdir(parents=True, exist_ok=True)
        lock = FileLock(own.with_suffix(".lock"), own)
    except (WorkError, LockedError) as error:
        (progress or NullProgress()).warn(f"{error.message}: if this is interrupted, it starts over")
        yield None
        return
    try:
        yield own
        with contextlib.suppress(WorkError):
            durable.remove_tree(own)
    finally:
        with contextlib.suppress(OSError):
            own.rmdir()  # a command that was refused kept nothing
        lock.release()

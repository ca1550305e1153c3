"""One writer per output: an advisory lock on a small file beside it.

The lock belongs to the open file, so the system drops it when the process dies however it dies; the file that a
dead process leaves behind never blocks anyone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from compress.artifact import durable
from compress.errors import UserError


class LockedError(UserError):
    """Another live process is writing this output."""


class FileLock:
    """An exclusive lock held from construction until `release`.

    Raises LockedError, naming the holder's pid, if a live process has it; WorkError if the file cannot be made.
    """

    def __init__(self, path: Path, what: Path) -> None:
        self.path = path
        self._handle = self._acquire(what)

    def _acquire(self, what: Path) -> int:
        while True:
            with durable.guarded("lock", self.path):
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
                os.close(handle)
                raise LockedError(
                    f"{what} is being written by {holder}",
                    "wait for it to finish, stop it, or give another --output",
                ) from None
            except OSError as error:
                os.close(handle)
                raise durable.explain(error, "lock", self.path) from error
            # The previous holder may have removed the file between our open and our lock.
            if _same_file(handle, self.path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                return handle
            os.close(handle)

    def release(self) -> None:
        """Remove the lock file and give the lock up. Does nothing the second time."""
        if self._handle < 0:
            return
        handle, self._handle = self._handle, -1
        try:
            durable.unlink(self.path)
        finally:
            with contextlib.suppress(OSError):
                os.close(handle)


def is_locked(path: Path) -> bool:
    """Whether a live process holds the lock file `path`. Creates nothing."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def _same_file(handle: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(handle)
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)

"""Every step of a run that must survive a power cut or a kill goes through here.

Each function reports to `step` before and after it acts. `step` does nothing; tests replace it to crash the
process at the n-th step, which is how the promise "resumes from any moment" is checked. Operating-system
errors leave as `WorkError` with the path, the cause and the next step in words.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from compress.errors import WorkError


def _nothing(label: str) -> None:
    """The default `step`."""


step: Callable[[str], None] = _nothing

Buffer = bytes | bytearray | memoryview

_AGAIN = "then run the same command again: finished blocks are kept"
_CAUSES = {
    errno.ENOSPC: ("the disk is full", f"free space or give an --output on another disk, {_AGAIN}"),
    errno.EDQUOT: ("the disk quota is used up", f"free space within your quota, {_AGAIN}"),
    errno.EROFS: ("the file system is read-only", "give an --output on a file system that can be written"),
    errno.EACCES: ("permission denied", "make the directory writable or give another --output"),
    errno.EPERM: ("operation not permitted", "make the directory writable or give another --output"),
    errno.EIO: ("the disk reported an input/output error", "check the disk (its log, its health), then run again"),
    errno.EFBIG: ("the file would be larger than allowed", f"raise the limit (`ulimit -f`) or change disk, {_AGAIN}"),
    errno.EXDEV: ("it would have to move between file systems", "give an --output that lies wholly on one file system"),
    errno.ENAMETOOLONG: ("the name is too long", "give a shorter --output"),
    errno.EMFILE: ("too many files are open", "raise the limit (`ulimit -n`) and run again"),
}


def explain(error: OSError, doing: str, path: Path) -> WorkError:
    """The `WorkError` that tells a user about `error`, met while `doing` something to `path`."""
    cause, hint = _CAUSES.get(
        error.errno or 0, (error.strerror or str(error), f"see whether {path.parent} can be written, {_AGAIN}")
    )
    return WorkError(f"cannot {doing} {path}: {cause}", hint)


@contextlib.contextmanager
def _acting(doing: str, path: Path) -> Iterator[None]:
    step(f"before {doing} {path.name}")
    with guarded(doing, path):
        yield
    step(f"after {doing} {path.name}")


@contextlib.contextmanager
def guarded(doing: str, path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into a WorkError about `doing` something to `path`."""
    try:
        yield
    except OSError as error:
        raise explain(error, doing, path) from error


def make_directory(path: Path) -> None:
    """Create one directory and record it in its parent. Does nothing if it is there."""
    if path.is_dir():
        return
    with _acting("create", path):
        path.mkdir()
    fsync_dir(path.parent)


def write_stream(path: Path, chunks: Iterable[Buffer]) -> tuple[str, int]:
    """Create `path` from `chunks` and fsync it; its directory is the caller's to fsync.

    Returns the SHA-256 and the number of bytes. A file that could not be written whole is removed, so that a
    full disk gets its space back.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with _acting("write", path), path.open("wb", buffering=0) as file:
            for chunk in chunks:
                view = memoryview(chunk).cast("B")
                digest.update(view)
                if size == 0:
                    step(f"during write {path.name}")
                size += len(view)
                while view:
                    view = view[file.write(view) :]
            step(f"before fsync {path.name}")
            os.fsync(file.fileno())
            step(f"after fsync {path.name}")
    except WorkError:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    return digest.hexdigest(), size


def write_bytes(path: Path, data: Buffer) -> str:
    """Create `path` holding `data` and fsync it. Returns the SHA-256."""
    return write_stream(path, [data])[0]


def write_atomic(path: Path, data: Buffer) -> str:
    """Replace `path` by `data` so that a reader, or a crash, sees the old file or the new one. Returns the SHA-256."""
    beside = temporary(path)
    sha256 = write_bytes(beside, data)
    rename(beside, path)
    fsync_dir(path.parent)
    return sha256


def temporary(path: Path) -> Path:
    """Where `write_atomic` prepares the next content of `path`."""
    return path.with_name(f".{path.name}.tmp")


def append_line(path: Path, line: bytes) -> None:
    """Append `line` and a newline to an existing file in one write, and fsync it."""
    with _acting("append to", path), path.open("ab", buffering=0) as file:
        data = memoryview(line + b"\n")
        while data:
            data = data[file.write(data) :]
        step(f"before fsync {path.name}")
        os.fsync(file.fileno())


def truncate(path: Path, size: int) -> None:
    """Cut a file to its first `size` bytes and fsync it."""
    with _acting("truncate", path), path.open("r+b", buffering=0) as file:
        file.truncate(size)
        os.fsync(file.fileno())


def fsync_dir(path: Path) -> None:
    """Make the names in a directory durable. File systems that cannot fsync a directory are taken at their word."""
    with _acting("fsync", path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(handle)


def rename(source: Path, target: Path) -> None:
    """Rename within a file system; `target` may be a file, or an empty directory if `source` is a directory."""
    with _acting("rename to", target):
        os.rename(source, target)


def symlink(target: str, path: Path) -> None:
    """Make `path` a symbolic link to `target`, replacing a link or file in one step. OSError where impossible."""
    beside = temporary(path)
    with contextlib.suppress(FileNotFoundError):
        beside.unlink()
    step(f"before link {path.name}")
    os.symlink(target, beside)
    rename(beside, path)
    fsync_dir(path.parent)


def unlink(path: Path) -> None:
    """Remove a file or a symbolic link. Does nothing if there is none."""
    with _acting("remove", path):
        path.unlink(missing_ok=True)


def remove_tree(path: Path, *, last: str | None = None) -> None:
    """Remove a directory with all it holds, files first, in a fixed order; links are removed, not followed.

    The file named `last` goes after all others, so that what a crash leaves can still be told by it.
    """
    if not path.exists():
        return
    with guarded("list", path):
        entries = sorted(path.iterdir(), key=lambda entry: (entry.name == last, entry))
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            remove_tree(entry)
        else:
            unlink(entry)
    with _acting("remove", path):
        path.rmdir()


def exchange(left: Path, right: Path) -> bool:
    """Swap two paths in one step. Returns False, having done nothing, where the system cannot."""
    step(f"before exchange {right.name}")
    swapped = _renameat2_exchange(left, right)
    step(f"after exchange {right.name}")
    return swapped


_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def _renameat2_exchange(left: Path, right: Path) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    outcome = renameat2(
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(os.fsencode(left)),
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(os.fsencode(right)),
        ctypes.c_uint(_RENAME_EXCHANGE),
    )
    if outcome == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise explain(OSError(code, os.strerror(code)), "exchange", right)

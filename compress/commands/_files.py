"""Files that a command writes beside its result: checked before the work, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from compress.errors import UserError


def check_writable(option: str, path: Path | None) -> None:
    """Raises UserError where `path`, given with `option`, cannot become a file; does nothing for None."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{option} {path} is a directory", "give the path of a file")
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: there is no directory {path.parent}", "make it, or give another path")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{option} {path} cannot be written: permission denied", "give another path")


def write(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader sees the old one or the whole new one. Raises WorkError where it cannot."""
    from compress.artifact import durable

    durable.write_atomic(path, content.encode() if isinstance(content, str) else content)

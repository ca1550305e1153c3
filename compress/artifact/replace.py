"""The last step of a run: the finished directory takes the output's name, in one step and losing nothing.

An artifact that is replaced is removed only after the new one stands in its place, and only if it holds nothing but
what its manifest lists. Anything else that was at the output is kept beside it as `<name>.replaced-N`.
"""

from __future__ import annotations

import errno
from pathlib import Path

from compress.artifact import durable
from compress.artifact.manifest import MANIFEST_NAME
from compress.artifact.output import aside_path
from compress.artifact.reader import Artifact
from compress.errors import CompressError, UserError, WorkError


def current(output: Path) -> Artifact | None:
    """The artifact at `output`, or None if there is none or its manifest is damaged."""
    try:
        return Artifact.open(output)
    except CompressError:
        return None


def _holds_only_an_artifact(output: Path) -> bool:
    artifact = current(output)
    if artifact is None:
        return False
    listed = {MANIFEST_NAME, *artifact.manifest.files, *artifact.manifest.attachments}
    return all(entry.name in listed and entry.is_file() for entry in output.iterdir())


def put(new: Path, output: Path, *, allowed: bool) -> Path | None:
    """Rename the directory `new` to `output`; `allowed` says whether to replace what is there.

    Returns where what was there is kept, if it was kept. A replaced artifact may be left at `new` or at
    `aside_path(output)`; the caller removes the one, the next run the other. Raises UserError if `output` is occupied
    and not `allowed`.
    """
    if not (output.is_dir() and any(output.iterdir())):
        _rename_onto(new, output)
        return None
    if not allowed:
        raise _occupied(output)
    if not _holds_only_an_artifact(output):
        kept = _free_name(output)
        durable.rename(output, kept)
        _rename_onto(new, output)
        return kept
    if durable.exchange(new, output):
        durable.fsync_dir(output.parent)
        return None
    aside = aside_path(output)
    if aside.exists():
        raise UserError(f"{aside} is in the way: no run made it", "move it away and run the same command again")
    durable.rename(output, aside)
    _rename_onto(new, output)
    durable.remove_tree(aside, last=MANIFEST_NAME)
    return None


def recover(output: Path) -> None:
    """Finish or undo a replacement that was cut short between its two renames.

    Only an artifact, or what a removal of one left of it, is touched; anything else of that name is somebody's own.
    """
    aside = aside_path(output)
    if not aside.is_dir() or aside.is_symlink():
        return
    emptied = not any(aside.iterdir())
    if not emptied and not _holds_only_an_artifact(aside):
        return
    if output.exists() or emptied:
        durable.remove_tree(aside, last=MANIFEST_NAME)
    else:
        durable.rename(aside, output)
    durable.fsync_dir(output.parent)


def _rename_onto(new: Path, output: Path) -> None:
    try:
        durable.rename(new, output)
    except WorkError as error:
        if getattr(error.__cause__, "errno", None) in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _occupied(output) from None
        raise
    durable.fsync_dir(output.parent)


def _free_name(output: Path) -> Path:
    number = 1
    while (path := output.with_name(f"{output.name}.replaced-{number}")).exists():
        number += 1
    return path


def _occupied(output: Path) -> UserError:
    return UserError(
        f"something else appeared at output {output} during the run",
        "move it away and run the same command again: all finished blocks are kept",
    )

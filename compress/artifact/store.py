"""Where artifacts go without `--output`, and what there is: `artifacts/<model>-<method>-<scheme>/vN` and `latest`."""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from compress.artifact import durable
from compress.artifact.lock import LockedError, is_locked
from compress.artifact.manifest import EVAL_NAME
from compress.artifact.output import Identity, existing, lock_path, resolve_output, staging_path
from compress.artifact.reader import LATEST, Artifact, is_artifact
from compress.artifact.scores import Score, headline_scores, scored_against
from compress.artifact.staging import Staging
from compress.errors import CompressError

DEFAULT_ROOT = Path("artifacts")
_VERSION = re.compile(r"v([1-9]\d*)")
_STAGED = re.compile(r"\.v([1-9]\d*)\.partial")
_LOCK = re.compile(r"\.v([1-9]\d*)\.lock")


def family_directory(model_name: str, method: str, scheme_label: str, root: Path = DEFAULT_ROOT) -> Path:
    """The directory of all versions of one model, method and layout, e.g. `artifacts/tales-6m-awq-w4a16-g128`."""
    name = "-".join((model_name, method, scheme_label))
    return root / (re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model")


def next_version(family: Path, identity: Identity, *, restart: bool = False, scored: bool = False) -> Path:
    """The version directory that a run should make: an unfinished one of the same identity, else the next number.

    A complete version is unfinished too while `latest` has not come to name it or a newer one, and, where the run is
    to be `scored`, while it has no scores. Creates nothing. A version that a live process is writing is left to it.
    """
    taken = [0]
    for entry in family.iterdir() if family.is_dir() else ():
        match = _VERSION.fullmatch(entry.name) or _STAGED.fullmatch(entry.name)
        if match is None and (match := _LOCK.fullmatch(entry.name)) and not is_locked(entry):
            match = None
        if match:
            taken.append(int(match[1]))
    if not restart:
        for number in sorted(set(taken[1:])):
            if _unfinished(resolve_output(family / f"v{number}"), identity):
                return family / f"v{number}"
        for number in sorted(set(taken[1:]), reverse=True):
            if (complete := _complete(resolve_output(family / f"v{number}"), identity)) is not None:
                unscored = scored and EVAL_NAME not in complete.manifest.attachments
                if unscored or _is_behind(family / LATEST, number):
                    return family / f"v{number}"
                break
    return family / f"v{max(taken) + 1}"


def _complete(output: Path, identity: Identity) -> Artifact | None:
    """The artifact at `output` if it is this run's result and none of its files is missing."""
    if not is_artifact(output) or is_locked(lock_path(output)):
        return None
    try:
        return existing(output, identity)
    except CompressError:
        return None


def _is_behind(latest: Path, number: int) -> bool:
    """Whether `latest` names an older version than this one, or is missing."""
    if latest.is_dir() and not latest.is_symlink():
        return False  # somebody's own directory
    try:
        named = os.readlink(latest) if latest.is_symlink() else latest.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return True
    except (OSError, UnicodeDecodeError):
        return False
    match = _VERSION.fullmatch(named)
    return match is not None and int(match[1]) < number


def _unfinished(output: Path, identity: Identity) -> bool:
    if output.exists() or is_locked(lock_path(output)):
        return False
    try:
        found = json.loads((staging_path(output) / "identity.json").read_bytes())
    except (OSError, ValueError):
        return False
    return all(found.get(key) == value for key, value in identity.to_json().items())


def open_next(family: Path, identity: Identity, *, restart: bool = False, scored: bool = False) -> Staging:
    """A Staging of the version that `next_version` names; where another process takes that first, of the one after."""
    while True:
        version = next_version(family, identity, restart=restart, scored=scored)
        try:
            return Staging(version, identity)
        except LockedError:
            continue  # its lock counts as taken now, so the next look gives another number


def update_latest(version: Path) -> None:
    """Make `latest` beside `version` name the highest finished version, as a relative link, or as a file without links.

    Does nothing for a path that is not called vN. Raises WorkError if it cannot be written.
    """
    if not _VERSION.fullmatch(version.name):
        return
    finished = [e.name for e in version.parent.iterdir() if _VERSION.fullmatch(e.name) and is_artifact(e)]
    if not finished:
        return
    newest = max(finished, key=lambda name: int(name[1:]))
    link = version.parent / LATEST
    if link.is_dir() and not link.is_symlink():
        return  # somebody's own directory
    try:
        durable.symlink(newest, link)
    except OSError:
        durable.write_atomic(link, f"{newest}\n".encode())


@dataclass(frozen=True, slots=True)
class Row:
    """One artifact as `compress list` shows it. `problem` is set, and the rest empty, where it cannot be read.

    `against` names the model that `scores` compare with where that is not the parent.
    """

    path: Path
    name: str
    version: int | None = None
    method: str = "-"
    scheme: str = "-"
    bits_per_weight: float | None = None
    bytes: int | None = None
    artifact_id: str | None = None
    created: str | None = None
    latest: bool = False
    scores: dict[str, Score] = field(default_factory=dict)
    against: str | None = None
    problem: str | None = None


def list_artifacts(root: str | Path = DEFAULT_ROOT, *, depth: int = 3) -> list[Row]:
    """Every artifact at most `depth` directories below `root`, by name and version. Empty if there is no `root`.

    Links and hidden directories are passed over. Nothing is created or changed.
    """
    rows = [_row(path) for path in _find(Path(root), depth)]
    return sorted(rows, key=lambda row: (row.name, row.version or 0, str(row.path)))


def _find(directory: Path, depth: int) -> list[Path]:
    if is_artifact(directory):
        return [directory]
    found: list[Path] = []
    if depth > 0 and directory.is_dir():
        with contextlib.suppress(PermissionError):
            for entry in sorted(directory.iterdir()):
                if entry.is_dir() and not entry.is_symlink() and not entry.name.startswith("."):
                    found += _find(entry, depth - 1)
    return found


def _row(path: Path) -> Row:
    versioned = _VERSION.fullmatch(path.name)
    name = path.resolve().parent.name if versioned else path.resolve().name
    try:
        artifact = Artifact.open(path)
    except CompressError as error:
        return Row(path, name, problem=error.message)
    problem = against = None
    try:
        record = artifact.eval()
        scores, against = headline_scores(record), scored_against(record, artifact.manifest.parents)
    except (CompressError, ValueError) as error:
        scores, problem = {}, str(error)
    manifest = artifact.manifest
    return Row(
        path=path,
        name=name,
        version=manifest.version,
        method=artifact.method,
        scheme=artifact.scheme,
        bits_per_weight=manifest.sizes.bits_per_weight,
        bytes=manifest.sizes.bytes,
        artifact_id=manifest.artifact_id,
        created=manifest.created,
        latest=_is_latest(path),
        scores=scores,
        against=against,
        problem=problem,
    )


def _is_latest(path: Path) -> bool:
    link = path.parent / LATEST
    if link.is_symlink():
        return os.readlink(link) == path.name
    return link.is_file() and link.read_text(encoding="utf-8").strip() == path.name

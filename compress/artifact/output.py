"""What an output path may be, and what is there already. Nothing here writes.

An output is free (nothing there, or an empty directory), complete (the finished artifact of the same resolved
recipe and source), or occupied. Only `restart` lets a run replace what occupies it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from compress.artifact.canonical import sha256_json
from compress.artifact.durable import guarded
from compress.artifact.manifest import (
    CONFIG_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    RECIPE_NAME,
    CalibrationRecord,
    Manifest,
    Parent,
)
from compress.artifact.reader import Artifact
from compress.errors import CompressError, IntegrityError, UserError, WorkError
from compress.formats.names import CONFIG_FILES


class Made(Protocol):
    """What says how an artifact was made."""

    @property
    def recipe_hash(self) -> str: ...

    @property
    def parents(self) -> Sequence[Parent]: ...

    @property
    def calibration(self) -> CalibrationRecord | None: ...


@dataclass(frozen=True)
class Identity:
    """What a run is a run of.

    `recipe_hash`, `source` (digest of the source model: model hash or artifact_id) and `calibration` (sha256 of the
    calibration tokens, None without) decide whether a finished artifact is this run's result. `environment` holds
    what else must be equal for blocks of a killed run to be used (package versions, device, dtype ...). A plan that
    does not hash the source leaves `source` None, and then any source counts as the same; no run may do that.
    `others`: digests of further models that decide the result, such as a teacher; they stand among the parents.
    `files`: SHA-256 by name of what goes over from the source unchanged (tokenizer, templates, licence), decides too.
    """

    recipe_hash: str
    source: str | None
    calibration: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] | None = None
    others: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "recipe_hash": self.recipe_hash,
            **({} if self.source is None else {"source": self.source}),
            "calibration": self.calibration,
            "environment": dict(self.environment),
            **({} if self.files is None else {"files": dict(self.files)}),
            **({"others": list(self.others)} if self.others else {}),
        }

    def sha256(self) -> str:
        """Hash over all of it."""
        return sha256_json(self.to_json())

    def made(self, result: Made) -> bool:
        """Whether a manifest (or what is to become one) tells of the result of this recipe, source and calibration."""
        calibration = result.calibration.sha256 if result.calibration else None
        source = result.parents[-1].digest
        mine = (self.recipe_hash, source if self.source is None else self.source, self.calibration)
        others = {parent.digest for parent in result.parents}
        return mine == (result.recipe_hash, source, calibration) and others.issuperset(self.others)

    def carries(self, manifest: Manifest) -> bool:
        """Whether an artifact's files besides config, weights and recipe are those that this run would carry over."""
        written = {CONFIG_NAME, RECIPE_NAME, INDEX_NAME, *CONFIG_FILES}
        carried = {name: record.sha256 for name, record in manifest.files.items() if name not in written}
        return self.files is None or self.files == {n: h for n, h in carried.items() if not n.endswith(".safetensors")}


def resolve_output(output: str | Path) -> Path:
    """The absolute path of an output, links followed."""
    return Path(os.path.realpath(output))


def staging_path(output: Path) -> Path:
    """Where the work on `output` (resolved) goes on until it is whole."""
    return output.with_name(f".{output.name}.partial")


def lock_path(output: Path) -> Path:
    """The lock file of `output` (resolved)."""
    return output.with_name(f".{output.name}.lock")


def aside_path(output: Path) -> Path:
    """Where an artifact that is being replaced waits, on systems that cannot exchange two directories."""
    return output.with_name(f".{output.name}.old")


def existing(output: str | Path, identity: Identity, *, restart: bool = False) -> Artifact | None:
    """What a run should do about `output`, asked before any work: None = go ahead, an Artifact = already complete.

    With `restart`, whatever is there may be replaced, so the answer is None. Raises UserError if the path cannot be
    an output (a file, a file in its path, a mount point, the current directory) or holds something else;
    IntegrityError if it holds this run's result with files missing or cut short; WorkError if it cannot be written.
    """
    path = resolve_output(output)
    with guarded("look at", path):
        return _existing(path, identity, restart)


def _existing(path: Path, identity: Identity, restart: bool) -> Artifact | None:
    artifact = _held(path, restart)
    if artifact is None:
        return None
    if not (identity.made(artifact.manifest) and identity.carries(artifact.manifest)):
        raise _occupied(path, "an artifact of another recipe or source")
    for name, record in artifact.manifest.files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != record.bytes:
            raise IntegrityError(
                f"output {path} holds the finished result, but {name} is missing or not {record.bytes} bytes long",
                f"see `compress verify {path}`; --restart makes it again",
            )
    return artifact


def refuse_itself(source: Path, output: str | Path | None) -> None:
    """UserError where a run would replace what it reads, the model or artifact at `source`. None: no output."""
    if output is not None and resolve_output(output) == resolve_output(source):
        raise UserError(f"output {output} is the artifact or model itself", "give another --output")


def refuse_occupied(output: str | Path | None, *, restart: bool = False) -> None:
    """What `existing` refuses whatever the recipe: asked before long work that leads to the recipe. None: no output."""
    if output is not None:
        path = resolve_output(output)
        with guarded("look at", path):
            _held(path, restart)


def _held(path: Path, restart: bool) -> Artifact | None:
    """The artifact at a possible output; None where a run may go ahead. Raises UserError where something else is."""
    check_path(path)
    if restart or not path.exists() or not any(path.iterdir()):
        return None
    artifact = _finished(path)
    if artifact is None:
        raise _occupied(path, "something else")
    return artifact


def _occupied(path: Path, what: str) -> UserError:
    return UserError(
        f"output {path} already holds {what}",
        "give another --output, or --restart to replace it (it stays until the new one is whole)",
    )


def _finished(path: Path) -> Artifact | None:
    if not (path / MANIFEST_NAME).is_file():
        return None
    try:
        return Artifact.open(path)
    except CompressError:
        return None


def check_path(path: Path) -> None:
    """Raise unless `path` (resolved) is, or could become, an output directory.

    UserError if not; WorkError without permission to write there.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"output {path} is a file", "give the path of a directory that does not exist yet")
    if os.path.ismount(path):
        raise UserError(
            f"output {path} is a mount point, which cannot appear in one step",
            f"give a directory inside it, such as --output {path / 'model'}",
        )
    here = Path.cwd()
    if path == here or path in here.parents:
        raise UserError(f"output {path} is or contains the current directory", "give a directory of its own")
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"output {path} lies under {parent}, which is a file", "give a path under directories")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise WorkError(
            f"cannot write in {parent}: you lack permission, or the file system is read-only",
            "make it writable or give another --output",
        )

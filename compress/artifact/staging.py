"""Where a run works until its artifact is whole: `.<name>.partial/` beside the output.

    identity.json     what this is a run of; removed first when the directory is discarded
    journal.jsonl     one line per finished block, the only authority on what is done
    parts/            output tensors, one safetensors file per block
    state/            activations to go on from; only the newest committed one is kept
    new/              the artifact being assembled; renamed to the output as the last step
    scratch/          what a run measured before the blocks, with a record of its own; no part of the journal

Files are written and fsynced before the journal line that names them, so a line never promises what is not there.
A killed run is resumed by opening a Staging of the same identity; nothing of another identity is ever mixed in.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from compress.artifact import durable, replace
from compress.artifact.canonical import canonical_json, sha256_file
from compress.artifact.journal import Journal
from compress.artifact.lock import FileLock
from compress.artifact.output import Identity, existing, lock_path, resolve_output, staging_path
from compress.artifact.publish import DEFAULT_SHARD_BYTES, Contents, build
from compress.artifact.reader import Artifact
from compress.artifact.tensorfile import load_tensors, write_tensors
from compress.errors import CompressError, IntegrityError, UserError

if TYPE_CHECKING:
    import torch

_IDENTITY = "identity.json"
_OURS = {_IDENTITY, f".{_IDENTITY}.tmp", "journal.jsonl", "parts", "state", "new", "scratch"}
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class Staging:
    """The exclusive right to make `output`, and all that is done so far. Use it as a context manager.

    Raises at construction: whatever `existing` raises; LockedError (a UserError) if another process is writing this
    output; UserError if an unfinished run of another identity is there and `restart` is not given.
    """

    def __init__(self, output: str | Path, identity: Identity, *, restart: bool = False) -> None:
        self.output = resolve_output(output)
        self.path = staging_path(self.output)
        self.identity = identity
        self.restart = restart
        self.kept_aside: Path | None = None
        self._completed: Artifact | None = None
        existing(self.output, identity, restart=restart)
        self._made_parents = _make_parents(self.output.parent)
        self._lock = FileLock(lock_path(self.output), self.output)
        had_staging = self.path.exists()
        try:
            self._open()
        except BaseException:
            if not had_staging:
                with contextlib.suppress(CompressError):
                    self._discard()
            self._lock.release()
            self._remove_empty_parents()
            raise

    def _open(self) -> None:
        replace.recover(self.output)
        self._completed = existing(self.output, self.identity, restart=self.restart)
        if self._completed is not None:
            if self._is_leftover():
                self._discard()
            return
        if self.path.exists() and not self._resumable():
            self._discard()
        durable.make_directory(self.path)
        for name in ("parts", "state"):
            durable.make_directory(self.path / name)
        self._journal = Journal(self.path / "journal.jsonl")
        if not (self.path / _IDENTITY).exists():
            durable.write_atomic(self.path / _IDENTITY, canonical_json(self._identity_record()))
        self._trust_what_is_sound()

    def _identity_record(self) -> dict[str, Any]:
        return {**self.identity.to_json(), "restart": self.restart}

    def _is_leftover(self) -> bool:
        """Whether the staging directory is of this very run, which is complete, or of none."""
        found = self._found_identity()
        return found is None or all(found.get(key) == value for key, value in self.identity.to_json().items())

    def _found_identity(self) -> dict[str, Any] | None:
        """identity.json; None if the process died while making or discarding the directory (nothing is committed)."""
        try:
            found: dict[str, Any] = json.loads((self.path / _IDENTITY).read_bytes())
        except (OSError, ValueError):
            return None
        return found

    def _resumable(self) -> bool:
        """Whether the staging directory is an earlier attempt at this very run; False if it may be discarded."""
        if unknown := {entry.name for entry in self.path.iterdir()} - _OURS:
            raise UserError(
                f"{self.path} is in the way: it holds {sorted(unknown)[0]}, which no run wrote",
                "move it away, or give another --output",
            )
        found = self._found_identity()
        if found is None or found == self._identity_record():
            return found is not None
        if self.restart:
            return False
        differing = sorted(key for key, value in self.identity.to_json().items() if found.get(key) != value)
        if not differing:  # it was begun with --restart, and what it was to replace is gone
            return True
        raise UserError(
            f"an unfinished run of another {' and '.join(differing).replace('_', ' ')} is in {self.path}",
            "run that one again to finish it, give another --output, or --restart to discard it and begin anew",
        )

    def _trust_what_is_sound(self) -> None:
        """Cut the journal to the entries whose files are unchanged, and remove every file that it does not name."""
        entries = self._journal.entries
        sound = 0
        while sound < len(entries) and self._intact(entries[sound].get("part")):
            sound += 1
        while sound and not self._intact(entries[sound - 1].get("state")):
            sound -= 1
        self._journal.keep(sound)
        named = {record["file"] for entry in entries[:sound] if (record := entry.get("part"))}
        if sound and (state := entries[sound - 1].get("state")):
            named.add(state["file"])
        for folder in ("parts", "state"):
            for file in sorted((self.path / folder).iterdir()):
                if f"{folder}/{file.name}" not in named:
                    durable.unlink(file)
        durable.remove_tree(self.path / "new")

    def _intact(self, record: dict[str, Any] | None) -> bool:
        if record is None:
            return True
        file = self.path / record["file"]
        with durable.guarded("read", file):
            return file.is_file() and sha256_file(file) == record["sha256"]

    @property
    def scratch(self) -> Path:
        """Where a run keeps what it can measure again; goes with the staging directory."""
        return self.path / "scratch"

    def completed(self) -> Artifact | None:
        """The finished artifact, if the output already holds it; then there is nothing to do but `close`."""
        return self._completed

    def journal(self) -> list[dict[str, Any]]:
        """The entries committed so far, all of whose files are there and unchanged."""
        return self._journal.entries

    def write_part(self, key: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Store output tensors durably under `key`; they count once an entry with this record as `part` is committed.

        Returns {file, sha256, tensors: {name: {dtype, shape, sha256, nbytes}}}. Raises WorkError if it cannot.
        """
        return self._write("parts", key, tensors)

    def write_state(self, key: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Store activations durably under `key`; the record goes into an entry as `state`."""
        return self._write("state", key, tensors)

    def _write(self, folder: str, key: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} cannot be a file name")
        file = self.path / folder / f"{key}.safetensors"
        records, sha256 = write_tensors(file, tensors)
        durable.fsync_dir(file.parent)
        return {"file": f"{folder}/{file.name}", "sha256": sha256, "tensors": records}

    def read_state(self, record: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The tensors behind a `state` (or `part`) record, mapped from the file."""
        return load_tensors(self.path / record["file"])

    def commit(self, entry: dict[str, Any]) -> None:
        """Append one entry to the journal; then drop the state of the entry before it.

        An entry is plain JSON data; `part` and `state` (records or None) are read here, and `replaces`: whether its
        tensors take the place of those of the same name in parts before it. The rest is the caller's.
        A `state` of None says that work can go on from here without one.
        """
        before = self._journal.entries[-1:]
        self._journal.append(entry)
        new = entry.get("state")
        for old in before:
            if (state := old.get("state")) and not (new and new["file"] == state["file"]):
                durable.unlink(self.path / state["file"])

    def publish(
        self,
        contents: Contents,
        *,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        check: Callable[[Path], None] | None = None,
    ) -> Artifact:
        """Assemble the artifact from all committed parts and make it appear at the output in one step.

        check: called with the assembled directory before it appears; what it raises keeps it from appearing.

        Raises IntegrityError if the ledger does not add up or a part was damaged, WorkError if it cannot be
        written, UserError if something else appeared at the output meanwhile. In each case nothing is published and
        the run can be resumed.
        """
        if not self.identity.made(contents):
            raise IntegrityError(
                "the contents to publish are of another recipe, source or calibration text than the run",
                "please report this",
            )
        parts = [self._located(record) for entry in self.journal() if (record := entry.get("part"))]
        replaced = _replaced(self.journal())
        try:
            build(
                self.path / "new",
                parts,
                contents,
                identity_sha256=self.identity.sha256(),
                version=_version(self.output, replace.current(self.output)),
                max_shard_bytes=max_shard_bytes,
                replaced={self.path / file: names for file, names in replaced.items()},
            )
            if check is not None:
                check(self.path / "new")
        except CompressError:
            with contextlib.suppress(CompressError):
                durable.remove_tree(self.path / "new")
            raise
        self.kept_aside = replace.put(self.path / "new", self.output, allowed=self.restart)
        self._discard()
        self._made_parents = []
        self._completed = Artifact.open(self.output)
        return self._completed

    def _located(self, record: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        return self.path / record["file"], record["tensors"]

    def _discard(self) -> None:
        """Remove the staging directory, its identity first so that a half-removed one is never resumed."""
        if self.path.exists():
            durable.unlink(self.path / _IDENTITY)
            durable.remove_tree(self.path)
            durable.fsync_dir(self.path.parent)

    def close(self) -> None:
        """Give the output up. Committed work stays for the next run; a run that committed nothing leaves nothing."""
        try:
            if self._completed is None and not self._journal.entries:
                self._discard()
        finally:
            self._lock.release()
            self._remove_empty_parents()

    def _remove_empty_parents(self) -> None:
        for parent in reversed(self._made_parents):
            with contextlib.suppress(OSError):
                parent.rmdir()

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _make_parents(parent: Path) -> list[Path]:
    """Create the missing directories above an output, outermost first. Returns those that were made."""
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    for directory in reversed(missing):
        durable.make_directory(directory)
    return missing[::-1]


def _replaced(entries: list[dict[str, Any]]) -> dict[str, set[str]]:
    """Which tensors of each part are out of date, because an entry that `replaces` others wrote them anew."""
    found: dict[str, set[str]] = {}
    for place, entry in enumerate(entries):
        if entry.get("replaces"):
            for before in entries[:place]:
                if part := before.get("part"):
                    found.setdefault(part["file"], set()).update(
                        part["tensors"].keys() & entry["part"]["tensors"].keys()
                    )
    return found


def _version(output: Path, replaced: Artifact | None) -> int:
    """N for an output called vN; otherwise one more than the artifact it replaces, or 1."""
    match = re.fullmatch(r"v([1-9]\d*)", output.name)
    if match:
        return int(match[1])
    return replaced.manifest.version + 1 if replaced else 1

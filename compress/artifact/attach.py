"""Add what belongs to an artifact but is not part of it: scores, the layer report, the card.

An attachment is listed in the manifest by hash and never changes artifact_id. All new files are written beside
the old ones first, then renamed, the manifest last: a full disk changes nothing, and what a crash between two
renames leaves is named by `verify` and healed by attaching again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from compress.artifact import durable
from compress.artifact.card import render
from compress.artifact.drafting import DRAFT_NAME, DraftRecord
from compress.artifact.kernel_record import KERNELS_NAME, KernelRecord
from compress.artifact.manifest import CARD_NAME, EVAL_NAME, LAYERS_NAME, MANIFEST_NAME, SAMPLES_NAME
from compress.artifact.reader import Artifact, follow_latest
from compress.errors import CompressError, UserError


def attach(path: str | Path, files: Mapping[str, bytes], *, without: Collection[str] = ()) -> Artifact:
    """Add or replace attachments (name -> content) of the artifact at `path`, and drop those `without`, all at once.

    Raises UserError if a name is not a plain file name or belongs to the artifact itself, IntegrityError if the
    manifest is damaged, WorkError if the directory cannot be written.
    """
    directory = follow_latest(Path(path))
    with _alone(directory):
        artifact = Artifact.open(directory)
        for name in files:
            if name == MANIFEST_NAME or name in artifact.manifest.files or Path(name).name != name or name[0] == ".":
                raise UserError(f"{name} cannot be an attachment", "give a file name that the artifact does not use")
        _clear(artifact, files)
        _put(artifact, files, without)
        return Artifact.open(directory)


def attach_eval(
    path: str | Path,
    record: Mapping[str, Any] | bytes,
    samples: bytes | None = None,
    kernels: KernelRecord | None = None,
) -> Artifact:
    """Attach an eval record as eval.json (and `samples` as samples.jsonl.gz, `kernels` as kernels.json), and render the
    card anew with it.

    record: the bytes of the file, or its content. Without `samples`, those of an earlier record are dropped; without
    `kernels`, an earlier record stays. Raises as `attach` does.
    """
    artifact = Artifact.open(path)
    data = record if isinstance(record, bytes) else _json(record)
    found = artifact.kernels() if kernels is None else kernels.model_dump(mode="json")
    files = {EVAL_NAME: data, CARD_NAME: _card(artifact, json.loads(data), artifact.draft(), found)}
    if kernels is not None:
        files[KERNELS_NAME] = kernels.to_bytes()
    if samples is None:
        return attach(path, files, without=(SAMPLES_NAME,))
    return attach(path, {**files, SAMPLES_NAME: samples})


def attach_draft(path: str | Path, record: DraftRecord) -> Artifact:
    """Attach what the artifact is worth as a draft as draft.json, and render the card anew. Raises as `attach` does."""
    artifact = Artifact.open(path)
    card = _card(artifact, artifact.eval(), record.model_dump(mode="json"), artifact.kernels())
    return attach(path, {DRAFT_NAME: record.to_bytes(), CARD_NAME: card})


_Record = Mapping[str, Any] | None


def _card(artifact: Artifact, scores: _Record, draft: _Record, kernels: _Record) -> bytes:
    layers = artifact.attachment(LAYERS_NAME)
    linears, learned = json.loads(layers) if layers else [], artifact.training()
    manifest, config, cut = artifact.manifest, artifact.config, artifact.cut()
    return render(manifest, config, linears, scores, learned, cut, draft, kernels).encode()


def _json(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _clear(artifact: Artifact, files: Mapping[str, bytes]) -> None:
    """Remove what an interrupted attaching left: unfinished files, and scores that no manifest came to list."""
    for entry in artifact.path.glob(".*.tmp"):
        durable.unlink(entry)
    for name in (EVAL_NAME, SAMPLES_NAME):
        if name not in artifact.manifest.attachments and name not in files and (artifact.path / name).exists():
            durable.unlink(artifact.path / name)


def _put(artifact: Artifact, files: Mapping[str, bytes], without: Collection[str]) -> None:
    directory = artifact.path
    prepared: list[Path] = []
    try:
        added = {}
        for name, data in files.items():
            prepared.append(directory / name)
            added[name] = durable.write_bytes(durable.temporary(directory / name), data)
        prepared.append(directory / MANIFEST_NAME)
        manifest = artifact.manifest.with_attachments(added, without)
        durable.write_bytes(durable.temporary(directory / MANIFEST_NAME), manifest.to_bytes())
    except CompressError:
        for target in prepared:
            with contextlib.suppress(OSError):
                durable.temporary(target).unlink()
        raise
    for target in prepared:
        durable.rename(durable.temporary(target), target)
    for name in without:
        durable.unlink(directory / name)
    durable.fsync_dir(directory)


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold a lock on the directory, so that two writers of attachments take turns."""
    if not directory.is_dir():
        raise UserError(f"{directory} is not an artifact: it is no directory", "`compress list` shows what there is")
    with durable.guarded("open", directory):
        handle = os.open(directory, os.O_RDONLY)
    try:
        with durable.guarded("lock", directory):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)

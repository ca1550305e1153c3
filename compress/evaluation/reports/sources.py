"""The records that reports are made from: eval.json files, and artifacts that carry their own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import IntegrityError, UserError
from compress.evaluation.records import EvalRecord, parse_record, read_record

if TYPE_CHECKING:
    from compress.artifact.reader import Artifact


@dataclass(frozen=True, slots=True)
class Source:
    """A record, the path it was asked for by, and the artifact that carries it, where one does."""

    path: str
    record: EvalRecord
    artifact: Artifact | None = None


def load_source(path: str | Path) -> Source:
    """The record of an eval.json file or of an artifact.

    Raises:
        UserError: nothing is there, or the model or artifact was not scored.
        IntegrityError: the record is damaged, was edited, or belongs to another artifact.
    """
    if Path(path).is_file():
        return Source(str(path), read_record(path))
    artifact = open_artifact(path)
    record = own_record(artifact)
    if record is None:
        raise UserError(f"{path} was not scored", f"run `compress eval {path} --baseline MODEL --attach` first")
    return Source(str(path), record, artifact)


def open_artifact(path: str | Path) -> Artifact:
    """The artifact at a path. Raises UserError where there is none, saying what to give for a plain model."""
    from compress.artifact.reader import Artifact, is_artifact

    directory = Path(path)
    if directory.is_dir() and not is_artifact(directory) and (directory / "config.json").is_file():
        raise UserError(
            f"{path} is a model, not an artifact, so it carries no scores",
            f"run `compress eval {path} --output eval.json`, and give that file",
        )
    return Artifact.open(path)


def own_record(artifact: Artifact) -> EvalRecord | None:
    """The scores that an artifact carries, None where it was not scored. Raises IntegrityError if they are not its."""
    data = artifact.attachment("eval.json")
    if data is None:
        return None
    record = parse_record(data, str(artifact.path / "eval.json"))
    if record.artifact_id != artifact.artifact_id:
        raise IntegrityError(
            f"{artifact.path / 'eval.json'} belongs to another artifact", "score this one again with `compress eval`"
        )
    return record

"""Where a source comes from: its own ancestors where it is an artifact, and itself."""

from __future__ import annotations

from compress.artifact.cut import CUT_NAME
from compress.artifact.manifest import Parent
from compress.artifact.reader import Artifact
from compress.models.checkpoint import Checkpoint


def parent(checkpoint: Checkpoint, stage: str) -> Parent:
    """The model as one step of a lineage; `stage` is what is done to it."""
    name, path = checkpoint.path.resolve().name, checkpoint.path.resolve()
    if checkpoint.is_artifact and name.startswith("v") and name[1:].isdigit():
        name = f"{path.parent.name}/{name}"
    return Parent(
        kind="artifact" if checkpoint.is_artifact else "model",
        name=name,
        digest=checkpoint.digest(),
        stage=stage,
        bytes=checkpoint.nbytes,
    )


def ancestors(checkpoint: Checkpoint) -> list[Parent]:
    """What an artifact was made from, root first; empty for any other model."""
    return list(Artifact.open(checkpoint.path).manifest.parents) if checkpoint.is_artifact else []


def carried(checkpoint: Checkpoint, stage: str) -> dict[str, bytes]:
    """The attachments that what this kind of stage makes of an artifact carries on, by name: what its cut lost.

    Behind a further pruning that would tell of a model that is no more. Raises IntegrityError where one is damaged.
    """
    if not checkpoint.is_artifact or stage == "prune":
        return {}
    found = Artifact.open(checkpoint.path).attachment(CUT_NAME)
    return {} if found is None else {CUT_NAME: found}

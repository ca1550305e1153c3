"""The check that comes before an artifact is computed with: its bytes are still those that were made."""

from __future__ import annotations

from pathlib import Path

from compress.artifact.verify import require_sound
from compress.models.checkpoint import Checkpoint


def check_artifact(path: str | Path, *, scores: bool = True) -> None:
    """Raises IntegrityError if `path` is one of our artifacts and any byte of it is not as it was made.

    With `scores` False, earlier scores and the card that shows them are not looked at: they have no part in what the
    model computes.
    """
    checkpoint = Checkpoint.open(path)
    if checkpoint.is_artifact:
        require_sound(checkpoint.path, scores=scores)

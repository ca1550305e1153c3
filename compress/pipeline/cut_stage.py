"""What the stages of all cuts have in common: the result is loaded and compared before it appears."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from compress.pipeline.cut_job import CutJob
from compress.pipeline.inputs import Activations
from compress.pipeline.kinds import Kind
from compress.pipeline.loaded_check import check_loaded

_J = TypeVar("_J", bound=CutJob, contravariant=True)


class CutKind(Kind[_J]):
    """As `kinds.Kind` has it."""

    keeps_last_state = True

    def check(self, job: _J, directory: Path, leaving: Activations | None) -> None:
        """Refuses a directory that transformers does not load as the model that was cut. Raises WorkError."""
        assert leaving is not None
        check_loaded(job, directory, leaving)

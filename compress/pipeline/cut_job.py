"""What the cuts have in common that take whole units out of a model: how much stays, and what they read."""

from __future__ import annotations

from dataclasses import dataclass

from compress.pipeline.work import Work
from compress.stages import PruneStage


class Cut:
    """`parameters` is what the whole model then has, of all_parameters; embeddings counted, tied copies not."""

    __slots__ = ()

    parameters: int
    all_parameters: int

    @property
    def keep(self) -> float:
        """The share of all parameters that stays."""
        return self.parameters / self.all_parameters


@dataclass(frozen=True, kw_only=True)
class CutJob(Work):
    """Everything a plan or a run of a cut needs; each kind adds its own Cut."""

    stage: PruneStage

    @property
    def label(self) -> str:
        assert self.stage.keep is not None
        return f"keep{100 * self.stage.keep:g}"

    @property
    def needs_blocks(self) -> bool:
        return True

    @property
    def needs_original(self) -> bool:
        return False

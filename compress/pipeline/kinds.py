"""What the loop over blocks asks of each kind of stage, and which module answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from compress.artifact.layers import LayerRecord
from compress.artifact.ledger import Action
from compress.artifact.manifest import Fallback
from compress.pipeline.block import Workers
from compress.pipeline.inputs import Activations
from compress.pipeline.work import Work
from compress.progress import Progress

Fate = dict[str, tuple[Action, list[str]]]
"""What became of each source tensor: the action, and the names of the output tensors that hold it now."""


@dataclass
class Written:
    """One finished block: its output tensors, the fate of its source tensors, the report of its linears.

    activations: entering the next block, None for data-free methods. attachments: text files of the artifact, by name.
    """

    tensors: dict[str, Tensor]
    fate: Fate
    layers: list[LayerRecord] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)
    activations: Activations | None = None
    attachments: dict[str, str] = field(default_factory=dict)


_W = TypeVar("_W", bound=Work, contravariant=True)


class Kind(Protocol[_W]):
    """One kind of stage. keeps_last_state: whether `check` needs the activations behind the last block."""

    keeps_last_state: bool = False

    def doing(self, work: _W) -> str:
        """What progress reports call it."""

    def decide(self, work: _W, workers: Workers, progress: Progress) -> dict[str, Any] | None:
        """What must be known of the whole model before the loop, as plain JSON data, which is journalled."""
        return None

    def outer(self, work: _W, tensors: dict[str, Tensor], fate: Fate) -> tuple[dict[str, Tensor], Fate]:
        """The tensors outside the blocks, from those that go over as they are, and their fate."""
        return tensors, fate

    def through_block(self, work: _W, block: int, entering: Activations | None, workers: Workers) -> Written:
        """Takes one block through the stage's method; `entering` is None for data-free methods."""

    def config(self, work: _W) -> dict[str, Any]:
        """config.json of the artifact."""

    def check(self, work: _W, directory: Path, leaving: Activations | None) -> None:
        """Raises a CompressError where the assembled directory is not what was made; nothing is published then.

        Where no shape changes there is nothing to look at.
        """
        return

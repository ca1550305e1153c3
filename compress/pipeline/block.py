"""One decoder block through the job's method."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import Executor
from dataclasses import dataclass, field

from torch import Tensor

from compress.artifact.manifest import Fallback
from compress.calibration.staged import Stage, StagedForward
from compress.pipeline.inputs import Activations
from compress.pipeline.linears import QuantizedLinear


@dataclass
class BlockResult:
    """linears: the quantised ones. changed: other float tensors that differ from the source, by checkpoint name.

    fallbacks: of the block as a whole; those of one linear are in its QuantizedLinear. activations: entering the next
    block, None for data-free methods.
    """

    linears: list[QuantizedLinear] = field(default_factory=list)
    changed: dict[str, Tensor] = field(default_factory=dict)
    fallbacks: list[Fallback] = field(default_factory=list)
    activations: Activations | None = None


@dataclass(frozen=True)
class Workers:
    """The pool that tasks run in, and how many of them run at a time."""

    pool: Executor
    count: int


def stages(forward: StagedForward | None) -> Generator[Stage, None, None]:
    """Its stages; none of no forward. Close it to end the forward early."""
    if forward is not None:
        yield from forward

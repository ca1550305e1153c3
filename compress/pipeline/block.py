"""One decoder block through the job's method."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field

from torch import Tensor, nn

from compress.artifact.manifest import Fallback
from compress.calibration.staged import Stage, StagedForward
from compress.models.skeleton import LinearSpec
from compress.pipeline.inputs import Activations
from compress.pipeline.job import Job
from compress.pipeline.linears import QuantizedLinear
from compress.pipeline.routing import ENTRY, Routing
from compress.pipeline.source import read_weight
from compress.pipeline.stream import Stream


@dataclass
class BlockResult:
    """linears: the quantised ones. changed: other float tensors that differ from the source, by checkpoint name.

    added: tensors that the source has no counterpart of, by checkpoint name, for each linear that they belong to.
    fallbacks: of the block as a whole; those of one linear are in its QuantizedLinear. activations: entering the next
    block, None for data-free methods.
    """

    linears: list[QuantizedLinear] = field(default_factory=list)
    changed: dict[str, Tensor] = field(default_factory=dict)
    added: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    fallbacks: list[Fallback] = field(default_factory=list)
    activations: Activations | None = None


@dataclass(frozen=True, eq=False)
class OpenBlock:
    """A block in memory, in the compute dtype, that a method rounds.

    live: its modules by checkpoint name. weights: the linears that differ from the source because a scale was folded
    into them, (out, in) float32. input_scales: (in,), what the inputs of a linear were divided by since.
    """

    module: nn.Module
    live: Mapping[str, nn.Module]
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    input_scales: Mapping[str, Tensor] = field(default_factory=dict)

    def weight(self, job: Job, spec: LinearSpec) -> Tensor:
        """The linear's float weight (out, in) float32. WorkError if it is not finite."""
        folded = self.weights.get(spec.name)
        return read_weight(job.checkpoint, spec) if folded is None else folded


def open_block(job: Job, block: int) -> OpenBlock:
    """The block as the source has it."""
    module = job.skeleton.materialise(block)
    return OpenBlock(module, job.skeleton.modules(block, module))


@dataclass(frozen=True)
class Workers:
    """The pool that tasks run in, and how many of them run at a time."""

    pool: Executor
    count: int


def stages(
    forward: StagedForward | None, routing: Routing | None = None, stream: Stream | None = None
) -> Generator[Stage, None, None]:
    """Its stages at linears; none of no forward. Close it to end the forward early.

    `routing` is settled, and `stream` keeps what it needs, where they pause.
    """
    for stage in forward or ():
        if stage.name == ENTRY:
            assert routing is not None
            routing.settle(stage.inputs)
        elif stream is None or not stream.keeps(stage):
            yield stage

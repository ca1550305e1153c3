"""The original block beside the one that is being changed: what each linear gets in both models, side by side."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

from torch import Tensor

from compress.calibration.staged import Stage, StagedForward
from compress.models.skeleton import LinearSpec
from compress.pipeline.block import Workers, stages
from compress.pipeline.inputs import Activations
from compress.pipeline.linears import sample_of
from compress.pipeline.routing import Routing
from compress.pipeline.stream import Stream
from compress.pipeline.work import Work


@dataclass(frozen=True, eq=False, slots=True)
class Pair:
    """One linear of the live block at which the forward pauses.

    counterpart: the same linear of the original block, paused too; None where it is not followed. originals: its
    inputs, by the place of their chunk. inputs: those of the live linear for the same tokens, all where none are
    followed. before: of a linear that adds to the residual stream, what it adds to in the live and in the original
    model, by place.
    """

    stage: Stage
    counterpart: Stage | None
    inputs: list[Tensor]
    originals: dict[int, Tensor]
    before: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})

    def samples(self) -> tuple[Tensor, Tensor | None]:
        """Some inputs of the linear in both models (tokens, in) float32, for the same tokens."""
        return sample_of(self.inputs), sample_of(list(self.originals.values())) if self.originals else None


def twin_of(
    job: Work,
    entering: Activations,
    specs: Sequence[LinearSpec],
    block: int,
    workers: Workers,
    streams: tuple[Stream, Stream] | None = None,
) -> StagedForward | None:
    """The original block on the chunks that are compared, or None where none are; it pauses at its stream too."""
    if not entering.original:
        return None
    original = job.skeleton.materialise(block)
    beside = job.skeleton.modules(block, original)
    # Tokens of an expert differ between the two models, so experts have no counterpart to compare with.
    watched = {} if streams is None else streams[1].watched(beside)
    watched |= {spec.name: beside[spec.name] for spec in specs if spec.expert is None}
    return StagedForward(entering.original_runs(job.skeleton, original), watched, workers.count)


def streams_of(job: Work, entering: Activations, block: int) -> tuple[Stream, Stream] | None:
    """The residual stream of this block in the live and in the original model; None where they are not compared."""
    if not entering.original:
        return None
    norms, compared = job.skeleton.branches(block), entering.original
    return Stream(norms, range(len(entering.quantized)), compared), Stream(norms, tuple(compared), compared)


def pairs(
    forward: StagedForward,
    twin: StagedForward | None,
    entering: Activations,
    specs: Sequence[LinearSpec],
    divided: Mapping[str, Tensor] | None = None,
    routing: Routing | None = None,
    streams: tuple[Stream, Stream] | None = None,
) -> Generator[Pair, None, None]:
    """The linears that `forward` reaches, each with its counterpart; then lets the original block run to its end.

    divided: (in,), what the inputs of a linear were divided by since the original; its counterpart's are given so too.
    streams: of the live and of the original block, where both forwards pause too.
    Close it to end both forwards early.
    """
    by_name = {spec.name: spec for spec in specs}
    now, then = streams or (None, None)
    with closing(stages(forward, routing, now)) as reached, closing(stages(twin, stream=then)) as counterparts:
        for stage in reached:
            counterpart = next(counterparts) if twin is not None and by_name[stage.name].expert is None else None
            if counterpart is None:
                yield Pair(stage, None, stage.inputs, {})
                continue
            assert counterpart.name == stage.name, "the two models must meet their linears in one order"
            seen = _as_now(counterpart.inputs, (divided or {}).get(stage.name))
            originals = dict(zip(entering.original, seen, strict=True))
            before = ({}, {}) if now is None or then is None else (now.before(stage.name), then.before(stage.name))
            yield Pair(stage, counterpart, [stage.inputs[place] for place in originals], originals, before)
        for _ in counterparts:
            pass


def _as_now(inputs: list[Tensor], divided: Tensor | None) -> list[Tensor]:
    """Inputs in the original model, divided as those of the changed one have been since."""
    return inputs if divided is None else [(chunk / divided).to(chunk.dtype) for chunk in inputs]

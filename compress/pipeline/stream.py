"""What the residual stream has lost where linears add to it, and how much of that their inputs tell.

A linear whose output is added to the stream can make up for more than the errors of its own inputs: for what earlier
linears have left wrong in the stream, as far as its inputs x know of it. That is the regression of r' - r on x, with
the stream r' of the original model and r of the quantised one; block-wise methods, which match the output of a block,
learn the same without saying so.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.calibration.staged import Stage

ROWS_PER_TASK = 256


@dataclass
class Stream:
    """The residual stream of one block in one model, in front of the norms that read it where a linear adds to it.

    norms: these, by the linear's name. places: of the chunks that pause, in their order; compared: which of them are
    kept, from a norm's pause to the next one's.
    """

    norms: Mapping[str, str]
    places: Sequence[int]
    compared: Container[int]
    _seen: tuple[str, dict[int, Tensor]] = ("", {})

    def watched(self, live: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """What a staged forward has to pause at besides linears."""
        return {norm: live[norm] for norm in self.norms.values()}

    def keeps(self, stage: Stage) -> bool:
        """Whether the forward paused at one of the norms; then its input is kept."""
        if stage.name not in self.norms.values():
            return False
        kept = {p: x for p, x in zip(self.places, stage.inputs, strict=True) if p in self.compared}
        self._seen = (stage.name, kept)
        return True

    def before(self, linear: str) -> dict[int, Tensor]:
        """The stream (tokens, hidden) that this linear adds to, by place; empty for one that does not add to it."""
        norm, kept = self._seen
        return kept if self.norms.get(linear) == norm else {}


def missed(
    now: Mapping[int, Tensor], then: Mapping[int, Tensor], inputs: Mapping[int, Tensor], pool: Executor
) -> Tensor:
    """mean (r' - r) x^T, (hidden, in) float32, over chunks by place; summed in their order.

    now: r, then: r', both (tokens, hidden); inputs: x, (tokens, in).
    """
    places = sorted(inputs)
    total = torch.zeros(now[places[0]].shape[1], inputs[places[0]].shape[1])
    for place in places:
        lost, x = then[place].float() - now[place].float(), inputs[place].float()

        def add(part: Tensor, rows: Tensor, x: Tensor = x) -> None:
            part.addmm_(rows.T, x)

        list(pool.map(add, total.split(ROWS_PER_TASK), lost.split(ROWS_PER_TASK, dim=1)))
    return total.div_(max(sum(inputs[place].shape[0] for place in places), 1))

"""Several processes share the chunks of a training: this one, and helpers that it starts or that were launched with it.

Data-parallel over torch.distributed (gloo). The sum of gradients goes from process to process in the order of chunks,
and each adds its own to what came, so the bytes are those of one process, whatever the number; a run that was killed
goes on with any other. Helpers hold no state: weights come from here, and only this process steps, measures and writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from compress.distillation import processes
from compress.errors import IntegrityError, WorkError
from compress.pipeline import helpers
from compress.pipeline.helpers import Helpers
from compress.pipeline.work import Problem
from compress.stages import DistillStage

if TYPE_CHECKING:
    from compress.pipeline.distill_job import DistillJob
    from compress.pipeline.distill_loop import Loop

GRADIENTS, HELD_OUT, END = range(3)


def problems(stage: DistillStage, chunks_per_step: int) -> list[Problem]:
    """What forbids sharing this training."""
    count = processes.wanted()
    if count > 1 and stage.method.own_text:
        return [Problem(f"{stage.method.kind} trains in one process", "leave --processes out, or use another --loss")]
    if count > chunks_per_step:
        said = f"a batch of {stage.batch_size} windows is shared by {chunks_per_step} processes at most, not {count}"
        return [Problem(said, "use fewer --processes, or a larger --batch-size")]
    return []


@contextmanager
def started(job: DistillJob, loop: Loop) -> Iterator[None]:
    """Gives `loop` its helpers while open; nothing where one process works alone.

    Raises:
        WorkError: a helper ended. IntegrityError: it read another text.
    """
    if processes.wanted() == 1:
        yield
        return
    count = processes.wanted()
    others = helpers.launched() if processes.are_launched() else helpers.started(count - 1)
    team = Team(job, loop, others, count)
    try:
        team.join()
        loop.team = team
        yield
        team.end()
    finally:
        loop.team = None
        team.close()


class Team:
    """This process, of rank 0, and its helpers."""

    def __init__(self, job: DistillJob, loop: Loop, others: Helpers, count: int) -> None:
        self._job, self._loop, self._helpers, self._count = job, loop, others, count
        self._sent: int | None = None
        self._store = others.call(
            {
                "threads": loop.workers.count,
                "recipe": job.recipe.model_dump(mode="json"),
                "model": str(job.checkpoint.path.resolve()),
                "answers": None if job.answers is None else str(job.answers.resolve()),
            }
        )

    def join(self) -> None:
        """Waits until all have read the same models and text."""
        for rank in range(1, self._count):
            if self._read(rank) != self._job.calibration.sha256:
                raise IntegrityError("a helper process read another text", "a file was changed meanwhile: run it again")
        with self._noticing():
            dist.init_process_group("gloo", store=self._store, rank=0, world_size=self._count, timeout=helpers.WAITS)

    def _read(self, rank: int) -> str:
        """The digest of the text that a helper read."""

        def refuse_lost() -> None:
            if (said := self._helpers.lost()) is not None:
                raise _lost(said)

        return helpers.awaited(self._store, ready_key(rank), refuse_lost).decode()

    def gradients(self, batch: list[int]) -> tuple[list[Tensor], float]:
        """As `Loop.gradients`, bit for bit."""
        with self._noticing():
            self._tell(GRADIENTS, batch)
            return add_up(self._loop, batch, 0, self._count)

    def held_out_sums(self) -> list[float]:
        """As `Loop.held_out_sums` of all chunks, bit for bit."""
        with self._noticing():
            self._tell(HELD_OUT, [])
            return measure(self._loop, 0, self._count)

    def end(self) -> None:
        """Lets the helpers go."""
        with self._noticing():
            dist.broadcast(torch.tensor([END, 0, 0]), 0)

    def close(self) -> None:
        """Clears away what is left of the group, whatever happened."""
        self._helpers.release()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _tell(self, what: int, numbers: list[int]) -> None:
        """Says what is next, with the weights where they changed since they were sent."""
        fresh = self._sent != self._loop.progressed.step
        dist.broadcast(torch.tensor([what, int(fresh), len(numbers)]), 0)
        if numbers:
            dist.broadcast(torch.tensor(numbers), 0)
        if fresh:
            dist.broadcast(flat(list(self._loop.learned.values())), 0)
            self._sent = self._loop.progressed.step

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if (said := self._helpers.lost(helpers.LOSS_SECONDS)) is None:
                raise
            raise _lost(said) from error


def _lost(said: str) -> WorkError:
    hint = "run the same command again: it resumes; fewer processes need less memory"
    return WorkError(f"a helper process of the training ended: {said}", hint)


def ready_key(rank: int) -> str:
    """Under which a helper says that it is ready."""
    return f"ready-{rank}"


def flat(tensors: list[Tensor]) -> Tensor:
    """All values in one vector."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def unflat(vector: Tensor, like: list[Tensor]) -> list[Tensor]:
    """What `flat` made a vector of."""
    parts = vector.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def add_up(loop: Loop, batch: list[int], rank: int, count: int) -> tuple[list[Tensor], float]:
    """The share of `rank` in the sum over a batch: begun with what the rank before sent, and sent on.

    Gives rank 0 the sum over all chunks, which comes back from the last rank.
    """
    share = batch[len(batch) * rank // count : len(batch) * (rank + 1) // count]
    before: Callable[[], tuple[list[Tensor], float]] | None = (lambda: _receive(loop, rank - 1)) if rank else None
    sums, loss = loop.summed(share, loop.tokens_of(batch), before)
    _send(sums, loss, (rank + 1) % count)
    return _receive(loop, count - 1) if rank == 0 else (sums, loss)


def measure(loop: Loop, rank: int, count: int) -> list[float]:
    """Sums of all held-out chunks, of which each rank computes every `count`-th."""
    sums = torch.zeros(len(loop.held_out), dtype=torch.float64)
    mine = list(range(rank, len(loop.held_out), count))
    sums[mine] = torch.tensor(loop.held_out_sums(mine), dtype=torch.float64)
    dist.all_reduce(sums)
    return list(sums.tolist())


def _send(sums: list[Tensor], loss: float, to: int) -> None:
    dist.send(flat(sums), to)
    dist.send(torch.tensor([loss], dtype=torch.float64), to)


def _receive(loop: Loop, source: int) -> tuple[list[Tensor], float]:
    like = list(loop.learned.values())
    vector, loss = torch.empty(sum(each.numel() for each in like)), torch.empty(1, dtype=torch.float64)
    dist.recv(vector, source)
    dist.recv(loss, source)
    return unflat(vector, like), float(loss)

"""Several processes share the chunks of a training: this one, and helpers that it starts on the same machine.

Data-parallel over torch.distributed (gloo). The sum of gradients goes from process to process in the order of chunks,
and each adds its own to what came, so the bytes are those of one process, whatever the number; a run that was killed
goes on with any other. Helpers hold no state: weights come from here, and only this process steps, measures and writes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from compress.distillation import processes
from compress.errors import IntegrityError, WorkError
from compress.pipeline.work import Problem
from compress.stages import DistillStage

if TYPE_CHECKING:
    from compress.pipeline.distill_job import DistillJob
    from compress.pipeline.distill_loop import Loop

GRADIENTS, HELD_OUT, END = range(3)
WAITS = timedelta(days=7)
"""How long a process waits for another one that lives; one that died is noticed at once."""
HELPER = "compress.pipeline.helper"


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
    team = Team(job, loop, processes.wanted())
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

    def __init__(self, job: DistillJob, loop: Loop, count: int) -> None:
        self._job, self._loop, self._count = job, loop, count
        self._sent: int | None = None
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=WAITS)
        order = {
            "port": self._store.port,
            "count": count,
            "threads": loop.workers.count,
            "recipe": job.recipe.model_dump(mode="json"),
            "model": str(job.checkpoint.path.resolve()),
            "answers": None if job.answers is None else str(job.answers.resolve()),
        }
        self._helpers = [_start({**order, "rank": rank}) for rank in range(1, count)]

    def join(self) -> None:
        """Waits until all have read the same models and text."""
        for rank, helper in enumerate(self._helpers, start=1):
            while not self._store.check([ready_key(rank)]):
                if helper.poll() is not None:
                    raise self._lost(helper)
                time.sleep(0.05)
            if self._store.get(ready_key(rank)).decode() != self._job.calibration.sha256:
                raise IntegrityError("a helper process read another text", "a file was changed meanwhile: run it again")
        with self._noticing():
            dist.init_process_group("gloo", store=self._store, rank=0, world_size=self._count, timeout=WAITS)

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
        for helper in self._helpers:
            helper.wait()

    def close(self) -> None:
        """Clears away what is left of the group, whatever happened."""
        for helper in self._helpers:
            if helper.poll() is None:
                helper.kill()
            helper.wait()
            assert helper.stdout is not None
            helper.stdout.close()
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
            ended = next((helper for helper in self._helpers if _ended(helper)), None)
            if ended is None:
                raise
            raise self._lost(ended) from error

    def _lost(self, helper: subprocess.Popen[bytes]) -> WorkError:
        assert helper.stdout is not None
        said = helper.stdout.read().decode(errors="replace").strip() or f"exit code {helper.wait()}"
        hint = "run the same command again: it resumes; fewer --processes need less memory"
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


def _start(order: dict[str, Any]) -> subprocess.Popen[bytes]:
    helper = subprocess.Popen([sys.executable, "-m", HELPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert helper.stdin is not None
    helper.stdin.write(json.dumps(order).encode())
    helper.stdin.close()
    return helper


def _ended(helper: subprocess.Popen[bytes]) -> bool:
    """Whether it ended; a connection may break a moment before the process is gone."""
    try:
        helper.wait(timeout=5.0)
    except subprocess.TimeoutExpired:
        return False
    return True

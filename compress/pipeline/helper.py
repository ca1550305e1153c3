"""A helper of trainings (`python -m compress.pipeline.helper`): computes its share of every batch, and keeps nothing.

It takes one order after the other from the store where it meets the process that it helps, and ends with it, also where
that one is killed. What it cannot go on with it says there, and prints nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from compress.distillation import processes
from compress.errors import CompressError
from compress.pipeline import helpers, team
from compress.pipeline.distill_job import DistillJob
from compress.pipeline.distill_loop import Loop
from compress.pipeline.distill_student import load_plain, open_student
from compress.pipeline.distill_teacher import Teacher
from compress.pipeline.resolve import resolve
from compress.pipeline.run import deterministic
from compress.pipeline.teacher_cache import TeacherCache
from compress.progress import NullProgress
from compress.recipe import Recipe


def main() -> int:
    """Helps until it is let go, or left alone; 0 then, 1 where something went wrong here."""
    warnings.filterwarnings("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    with contextlib.suppress(KeyboardInterrupt, RuntimeError), processes.joined(), processes.shared_by(1):
        store = helpers.store()
        for number in itertools.count():
            order = helpers.awaited(store, helpers.order_key(number))
            if order == helpers.OVER:
                break
            if not _helped(json.loads(order), store, number):
                return 1
    return 0  # let go, or alone: what became of the process that it helped is that one's to say


def _helped(order: dict[str, Any], store: dist.Store, number: int) -> bool:
    """Helps with one training; False where something went wrong, once that was heard of."""
    try:
        _help(order, helpers.of_training(store, number))
    except Exception as error:  # whatever it is, the process that is helped has to say it
        said = error.message if isinstance(error, CompressError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(RuntimeError):
            store.set(helpers.LOST, " ".join(said.split())[:300])
            if dist.is_initialized():
                dist.destroy_process_group()
            helpers.awaited(store, helpers.order_key(number + 1))  # a launcher ends all where one ends first
        return False
    return True


def _help(order: dict[str, Any], store: dist.Store) -> None:
    torch.set_num_threads(order["threads"])
    answers = None if order["answers"] is None else Path(order["answers"])
    recipe = Recipe.model_validate(order["recipe"])
    with deterministic() as workers:
        job = resolve(recipe, model=order["model"], output=None, device="cpu", answers=answers)
        assert isinstance(job, DistillJob)
        teacher = Teacher(
            load_plain(job.teacher.path, job.compute_dtype), job.calibration.tokens.numel(), job.teacher_states
        )
        loop = Loop(job, open_student(job), teacher, workers, 1)
        if job.stage.cache is not None:
            loop.cache = TeacherCache(job, teacher, NullProgress())
        rank, count = processes.rank(), processes.launched()
        store.set(team.ready_key(rank), job.calibration.sha256)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=helpers.WAITS)
        _serve(loop, rank, count)
        dist.destroy_process_group()


def _serve(loop: Loop, rank: int, count: int) -> None:
    masters = list(loop.learned.values())
    while True:
        said = torch.zeros(3, dtype=torch.int64)
        dist.broadcast(said, 0)
        what, fresh, length = said.tolist()
        if what == team.END:
            return
        numbers = torch.zeros(length, dtype=torch.int64)
        if length:
            dist.broadcast(numbers, 0)
        if fresh:
            vector = torch.empty(sum(master.numel() for master in masters))
            dist.broadcast(vector, 0)
            with torch.no_grad():
                for master, values in zip(masters, team.unflat(vector, masters), strict=True):
                    master.copy_(values)
            loop.student.use_masters()
        if what == team.GRADIENTS:
            team.add_up(loop, numbers.tolist(), rank, count)
        else:
            team.measure(loop, rank, count)


if __name__ == "__main__":
    os._exit(main())

"""A helper of a training (`python -m compress.pipeline.helper`): computes its share of every batch, and keeps nothing.

It reads one order as JSON from stdin. What ends it is the one line on its stdout. It ends with the process that it
helps, also where that one is killed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from compress.errors import CompressError
from compress.pipeline import team
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
    """Helps until it is let go; 0 then, 1 where something went wrong."""
    order = json.load(sys.stdin)
    warnings.filterwarnings("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    torch.set_num_threads(order["threads"])
    try:
        _help(order)
    except KeyboardInterrupt:
        return 1
    except Exception as error:  # whatever it is, the process that is helped has to say it
        said = error.message if isinstance(error, CompressError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):  # nobody listens where that process was killed
            print(" ".join(said.split())[:300], flush=True)
        return 1
    return 0


def _help(order: dict[str, Any]) -> None:
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
        rank, count = order["rank"], order["count"]
        store = dist.TCPStore("127.0.0.1", order["port"], is_master=False, wait_for_workers=False, timeout=team.WAITS)
        store.set(team.ready_key(rank), job.calibration.sha256)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=team.WAITS)
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

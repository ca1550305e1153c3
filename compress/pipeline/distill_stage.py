"""A distillation from staging to artifact: plan the steps, train, journal, measure what is written, hand it over."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.artifact import cut
from compress.artifact.cut import CUT_NAME
from compress.artifact.layers import LayerRecord
from compress.artifact.ledger import Action
from compress.artifact.manifest import Fallback, Parent
from compress.artifact.publish import Contents
from compress.artifact.staging import Staging
from compress.artifact.training import TRAINING_NAME, HeldOut, TrainingRecord
from compress.models.checkpoint import Checkpoint
from compress.models.skeleton import Skeleton
from compress.pipeline import lineage, on_policy, output, packed_student, team
from compress.pipeline.block import Workers
from compress.pipeline.distill_job import DistillJob
from compress.pipeline.distill_loop import Loop, Progressed
from compress.pipeline.distill_student import load_plain, load_student, open_student, written
from compress.pipeline.distill_teacher import Teacher
from compress.pipeline.kinds import Fate
from compress.pipeline.teacher_cache import TeacherCache
from compress.progress import Progress
from compress.recipe import Recipe

CHECKPOINT_SECONDS = 30.0
BEGIN, WEIGHTS = "begin", "weights"
LEFT = Fallback(name="training", action="left as it was", reason="no step was better on held-out windows")


def train(job: DistillJob, staging: Staging, workers: Workers, progress: Progress) -> tuple[int, int]:
    """Does what the journal does not hold yet; returns how many steps were there and how many were made."""
    entries = staging.journal()
    if any(entry["key"] == WEIGHTS for entry in entries):
        return entries[-1]["training"]["done"], 0
    student = open_student(job)
    live = load_plain(job.teacher.path, job.compute_dtype)
    teacher = Teacher(live, job.calibration.tokens.numel(), job.teacher_states)
    steps = entries[0]["training"]["steps"] if entries else job.stage.steps
    loop = Loop(job, student, teacher, workers, steps or 1)
    if job.stage.cache is not None:
        loop.cache = TeacherCache(job, teacher, progress)
    with team.started(job, loop):
        resumed = _learn(job, loop, live, staging, entries, progress)
    _hand_over(job, loop, staging, workers)
    return resumed, loop.progressed.step - resumed


def _learn(
    job: DistillJob, loop: Loop, live: Any, staging: Staging, entries: list[dict[str, Any]], progress: Progress
) -> int:
    """All steps that are missing; returns how many were there. live: the teacher."""
    if len(entries) > 1:
        loop.restore(_progressed(entries), staging.read_state(entries[-1]["state"]))
    else:
        loop.measure()
    if not entries:
        if job.stage.steps is None:
            loop.steps = _affordable(loop)
        _commit(staging, BEGIN, {"steps": loop.steps})
    resumed = loop.progressed.step
    checkpoints = _Checkpoints(loop, staging)
    progress.begin(f"training ({job.method_name}, {job.label})", loop.steps)
    for _ in range(resumed):
        progress.advance("done before")
    if job.stage.method.own_text:
        on_policy.train(job, loop, live, progress, checkpoints.passed)
    else:
        _steps(loop, progress, checkpoints)
    progress.end()
    return resumed


def _affordable(loop: Loop) -> int:
    """How many steps fit into the minutes asked for, measured on the first batch, what is measured on held out too.

    The teacher is slow once per chunk and then remembers; the second round of the same batch shows the step alone.
    """
    assert loop.job.stage.minutes is not None
    budget = 60.0 * loop.job.stage.minutes
    batch = loop.batch(0)
    first = _seconds(lambda: loop.gradients(batch))
    step = min(_seconds(lambda: loop.gradients(batch)) for _ in range(2))
    new_batches = math.ceil(len(loop.training) / len(batch))
    budget -= 21 * _seconds(loop.held_out_kl)
    extra = max(0.0, first - step)
    known = max(0.0, budget) / (step + extra)
    steps = known if known <= new_batches else (budget - new_batches * extra) / step
    return max(1, int(steps))


def _seconds(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _steps(loop: Loop, progress: Progress, checkpoints: _Checkpoints) -> None:
    """Trains until the steps are done or nothing gets better."""
    while not loop.finished:
        loss = loop.step()
        kl = loop.measure_if_due()
        progress.advance(f"loss {loss:.4f}, held-out KL {kl:.4f}")
        checkpoints.passed()


class _Checkpoints:
    """What is journalled every so many seconds, and behind the last step."""

    def __init__(self, loop: Loop, staging: Staging) -> None:
        self._loop, self._staging = loop, staging
        now = loop.progressed
        self._noted = now.step, len(now.held_out) if now.step else 0
        self._saved = time.monotonic()

    def passed(self) -> None:
        """A step was taken: journals what is new, with the state to go on from, if it is time to."""
        loop, now = self._loop, self._loop.progressed
        if time.monotonic() - self._saved < CHECKPOINT_SECONDS and not loop.finished:
            return
        key, (steps, measured) = f"step-{now.step:06d}", self._noted
        news = {"losses": now.losses[steps:], "held_out": now.held_out[measured:], "step": now.step}
        _commit(self._staging, key, news, state=self._staging.write_state(key, loop.state()))
        self._noted = now.step, len(now.held_out)
        self._saved = time.monotonic()


def _progressed(entries: list[dict[str, Any]]) -> Progressed:
    found = Progressed()
    for entry in entries[1:]:
        found.losses += entry["training"]["losses"]
        found.held_out += [(int(step), float(kl)) for step, kl in entry["training"]["held_out"]]
        found.step = entry["training"]["step"]
    return found


def _hand_over(job: DistillJob, loop: Loop, staging: Staging, workers: Workers) -> None:
    """Writes the tensors of the artifact, the best weights among them, and what they measure."""
    assert loop.progressed.best is not None
    trained = written(job, loop.student, loop.progressed.best)
    kl = _written_kl(job, loop, trained.dense)
    action: Action = "merged" if loop.student.linears else "trained"
    tied = job.skeleton.stored_copies()
    fate: Fate = {name: (action, [name]) for name in trained.dense}
    fate |= {name: ("quantized", into) for name, into in trained.into.items()}
    fate |= {name: ("tied", [job.skeleton.tied()[name]]) for name in tied}
    rest = [name for name in job.checkpoint.index if name not in fate]
    tensors, fate = output.keep(job, rest, dict(trained.stored), fate)
    part = staging.write_part(WEIGHTS, tensors)
    sha256 = {name: record["sha256"] for name, record in part["tensors"].items()}
    now = loop.progressed
    record = TrainingRecord(
        teacher=job.teacher_name,
        loss=job.stage.method.model_dump(mode="json"),
        trained=job.label,
        parameters=sum(master.numel() for master in loop.student.masters.values()),
        learning_rate=loop.rate,
        steps=loop.steps,
        done=now.step,
        best_step=now.best_step,
        tokens_per_step=job.tokens_per_step,
        held_out_tokens=loop.held_out_tokens,
        stopped_early=now.step < loop.steps,
        written_kl=kl,
        zeros=sum(int((~kept).sum()) for kept in loop.student.kept.values()),
        held_out=[HeldOut(step=step, kl=value) for step, value in now.held_out],
        losses=now.losses,
    )
    ledger = {name: entry.model_dump() for name, entry in output.ledger(job, fate, sha256).items()}
    layers = [layer.model_dump(mode="json") for layer in _layers(job, loop, trained.dense)]
    fallbacks = [LEFT.model_dump()] if now.best_step == 0 else []
    _commit(
        staging, WEIGHTS, record.model_dump(mode="json"), part=part, ledger=ledger, layers=layers, fallbacks=fallbacks
    )


def _written_kl(job: DistillJob, loop: Loop, trained: Mapping[str, Tensor]) -> float:
    """The held-out KL of the weights as the artifact holds them."""
    model = load_student(job).eval()
    with torch.no_grad():
        for live, parameter in model.named_parameters():
            if (tensor := trained.get(job.skeleton.stored_name(live))) is not None:
                parameter.copy_(tensor)
    plain = copy.copy(loop)
    plain.student = replace(loop.student, model=model)
    return plain.held_out_kl()


def _layers(job: DistillJob, loop: Loop, trained: Mapping[str, Tensor]) -> list[LayerRecord]:
    """The report of every linear that learned; pruned ones say how many zeros they still have."""
    records = []
    for spec in job.skeleton.linears():
        if (now := trained.get(spec.weight)) is None:
            continue
        before = job.checkpoint.read(spec.weight).float()
        change = float((now.float() - before).norm() / before.norm()) if before.any() else 0.0
        details: dict[str, Any] = {"relative_change": change}
        if (kept := loop.student.kept.get(spec.weight)) is not None:
            details |= {"weights": kept.numel(), "zeros": int((now == 0).sum()), "zeros_before": int((~kept).sum())}
        records.append(
            LayerRecord(name=spec.name, block=spec.block, method=job.method_name, scheme=job.label, details=details)
        )
    return records


def _commit(staging: Staging, key: str, training: dict[str, Any], **given: Any) -> None:
    blank: dict[str, Any] = {"part": None, "state": None, "ledger": {}, "layers": [], "fallbacks": []}
    staging.commit({"key": key, **blank, "training": training, **given})


def finished(job: DistillJob, contents: Contents, entries: list[dict[str, Any]]) -> Contents:
    """What only a distillation adds: both parents, the training record, and the steps in the resolved recipe."""
    record = TrainingRecord(**entries[-1]["training"])
    *earlier, stage = job.told.stages
    resolved: Recipe = job.told.model_copy(
        update={"stages": [*earlier, stage.model_copy(update={"steps": record.steps})]}
    )
    attachments = {**contents.attachments, TRAINING_NAME: record.to_bytes()}
    if (lost := attachments.get(CUT_NAME)) is not None:
        attachments[CUT_NAME] = cut.taught(lost, record)
    return replace(
        contents,
        parents=[*contents.parents[:-1], _teaching(job), contents.parents[-1]],
        recipe_yaml=resolved.to_yaml(),
        attachments=attachments,
    )


def _teaching(job: DistillJob) -> Parent:
    return lineage.parent(job.teacher, "teach")


def check(job: DistillJob, directory: Path) -> None:
    """Refuses a directory that does not load whole."""
    if job.recorded:
        checkpoint = packed_student.opened(Checkpoint.open(directory))
        Skeleton(checkpoint, torch.float32)
    else:
        load_plain(directory, torch.float32)

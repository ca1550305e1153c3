"""run(): the loop over blocks. Killed at any moment, the next run goes on behind the last journalled block.

All arithmetic happens in tasks that are single-threaded, cut at fixed sizes and summed in a fixed order; the pool only
decides who computes what. So the bytes written do not depend on the number of threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import compress
from compress.artifact import store
from compress.artifact.layers import LayerRecord
from compress.artifact.ledger import LedgerEntry
from compress.artifact.manifest import CalibrationPart, CalibrationRecord, Fallback
from compress.artifact.publish import Contents
from compress.artifact.reader import Artifact
from compress.artifact.staging import Staging
from compress.pipeline import (
    curvature,
    depth_stage,
    distill_stage,
    experts_stage,
    inputs,
    lineage,
    output,
    prune_stage,
    quantize_stage,
    redrawn,
    refine,
    tables_stage,
    width_stage,
)
from compress.pipeline.block import Workers
from compress.pipeline.committer import Committer
from compress.pipeline.depth_job import DepthJob
from compress.pipeline.distill_job import DistillJob
from compress.pipeline.entries import DECISION, OUTER, REFINE, blocks_done, commit, holds
from compress.pipeline.experts_job import ExpertsJob
from compress.pipeline.inputs import Activations
from compress.pipeline.job import Job
from compress.pipeline.kinds import Kind, Written
from compress.pipeline.prune_job import PruneJob
from compress.pipeline.resolve import resolve
from compress.pipeline.width_job import WidthJob
from compress.pipeline.work import Whole, Work, environment
from compress.progress import NullProgress, Progress
from compress.quantization.configs import RefineConfig
from compress.recipe import Recipe

KINDS: dict[type[Work], Kind[Any]] = {
    Job: quantize_stage.QuantizeKind(),
    PruneJob: prune_stage.PruneKind(),
    WidthJob: width_stage.WidthKind(),
    DepthJob: depth_stage.DepthKind(),
    ExpertsJob: experts_stage.ExpertsKind(),
}


@dataclass(frozen=True)
class RunResult:
    """The artifact, and how it came to be. `seconds` covers the blocks: weights in memory to tensors written."""

    artifact: Artifact
    complete_already: bool
    resumed_blocks: int
    computed_blocks: int
    seconds: float


def run(
    recipe: Recipe,
    *,
    model: str | Path | None = None,
    output: str | Path | None = None,
    device: str = "auto",
    restart: bool = False,
    scored: bool = False,
    progress: Progress | None = None,
    whole: Whole | None = None,
    answers: Path | None = None,
) -> RunResult:
    """Carries out a recipe and publishes the artifact.

    Args:
        model: directory or hub id; overrides the recipe's; the packaged model if neither is given.
        output: the artifact's directory; the next version under `artifacts/` if not given.
        restart: replace whatever the output holds, at the end and in one step.
        scored: whether the caller will score the artifact; without `output`, a complete version that was not scored
            is then taken up instead of making the next.
        whole: the run of several stages whose last one this is; the artifact tells of that.
        answers: where the teacher's answers are, for a distillation that asks for them.

    Raises:
        UserError, WorkError, IntegrityError: nothing is published, and what was there stays. Work that was journalled
            is used by the next run of the same recipe on the same source.
    """
    progress = progress or NullProgress()
    with deterministic() as workers:
        job = resolve(recipe, model=model, output=output, device=device, whole=whole, answers=answers)
        job.refuse_problems()
        with _staging(job, restart, scored) as staging:
            done = staging.completed()
            if done is not None:
                if output is None:
                    store.update_latest(done.path)
                return RunResult(done, True, 0, 0, 0.0)
            if isinstance(job, Job) and job.stage.method.warning is not None:
                progress.warn(job.stage.method.warning)
            started = time.perf_counter()
            learner = redrawn.extended(job, workers, progress)
            if isinstance(learner, Job):
                learner = curvature.measured(learner, staging.scratch, workers, progress)
            resumed, computed = _work(learner, staging, workers, progress)
            if isinstance(learner, Job) and learner.stage.refine is not None:
                _refine(learner, learner.stage.refine, staging, workers, progress)
            seconds = time.perf_counter() - started
            artifact = staging.publish(_contents(job, staging.journal()), check=_check(learner, staging))
            if staging.kept_aside is not None:
                progress.warn(f"what {artifact.path.name} held besides an artifact was moved to {staging.kept_aside}")
    if output is None:
        store.update_latest(artifact.path)
    return RunResult(artifact, False, resumed, computed, seconds)


@contextmanager
def deterministic() -> Iterator[Workers]:
    """One thread per operation, as many operations at a time as torch would have used threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield Workers(pool, threads)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)


def _staging(job: Work, restart: bool, scored: bool) -> Staging:
    identity = job.identity()
    if job.output is not None:
        return Staging(job.output, identity, restart=restart)
    return store.open_next(job.family_directory, identity, restart=restart, scored=scored)


def _work(job: Work, staging: Staging, workers: Workers, progress: Progress) -> tuple[int, int]:
    """Does what the journal does not hold yet; returns how many blocks or steps were there, and how many were made."""
    if isinstance(job, DistillJob):
        return distill_stage.train(job, staging, workers, progress)
    return _blocks(job, staging, workers, progress)


def _blocks(job: Work, staging: Staging, workers: Workers, progress: Progress) -> tuple[int, int]:
    """Does what the journal does not hold yet; returns how many blocks were there and how many were computed."""
    done = blocks_done(staging)
    total = job.skeleton.num_blocks
    kind = KINDS[type(job)]
    _decide(job, kind, staging, workers, progress)
    if not holds(staging, OUTER):
        commit(job, staging, OUTER, *kind.outer(job, *output.outer_tensors(job)))
    rows = tables_stage.before_blocks(job, staging, workers, progress) if isinstance(job, Job) else None
    head_follows = isinstance(job, Job) and tables_stage.head_follows(job, staging)
    activations = _activations(job, staging, done, rows) if done < total or head_follows else None
    progress.begin(kind.doing(job), total)
    for block in range(done):
        progress.advance(f"block {block}: done before")
    with Committer() as committer:
        for block in range(done, total):
            written = kind.through_block(job, block, activations, workers)
            activations = written.activations
            state = activations if block < total - 1 or kind.keeps_last_state or head_follows else None

            def store_block(block: int = block, written: Written = written, state: Activations | None = state) -> None:
                layers = [*written.layers, *output.left_alone(job, block)]
                commit(
                    job, staging, f"block-{block:05d}", written.tensors, written.fate, layers, written.fallbacks, state,
                    attachments=written.attachments,
                )  # fmt: skip
                progress.advance(f"block {block}")

            committer.submit(store_block)
    progress.end()
    if isinstance(job, Job) and head_follows:
        tables_stage.behind_blocks(job, staging, activations, workers, progress)
    return done, total - done


def _decide(job: Work, kind: Kind[Any], staging: Staging, workers: Workers, progress: Progress) -> None:
    """Fills `job.decided`, from the journal where an earlier attempt settled it."""
    decided = next((entry[DECISION] for entry in staging.journal() if entry["key"] == DECISION), None)
    if decided is None and (decided := kind.decide(job, workers, progress)) is not None:
        staging.commit(
            {"key": DECISION, "part": None, "state": None, "ledger": {}, "layers": [], "fallbacks": []}
            | {DECISION: decided}
        )
    job.decided.update(decided or {})


def _activations(job: Work, staging: Staging, done: int, rows: tables_stage.Rows | None) -> Activations | None:
    if not job.needs_blocks:
        return None
    assert job.walked is not None
    start = inputs.enter(job.skeleton, job.walked, job.needs_original, job.follows_all, rows, job.follows_plain)
    if not done:
        return start
    return inputs.resume(start, done, staging.read_state(staging.journal()[-1]["state"]))


def _refine(job: Job, settings: RefineConfig, staging: Staging, workers: Workers, progress: Progress) -> None:
    """Tunes the finished blocks together, unless the journal holds that already; killed, it begins anew."""
    entries = staging.journal()
    if any(entry["key"] == REFINE for entry in entries):
        return
    blocks = [entry for entry in entries if entry["key"] not in (OUTER, DECISION)]
    stored = {name: tensor for entry in blocks for name, tensor in staging.read_state(entry["part"]).items()}
    layers = [LayerRecord(**row) for entry in blocks for row in entry["layers"]]
    written = refine.refine(job, settings, stored, layers, workers, progress)
    hashes = {name: record["sha256"] for entry in blocks for name, record in entry["part"]["tensors"].items()}
    commit(
        job, staging, REFINE, written.tensors, written.fate, written.layers, written.fallbacks, earlier=hashes,
    )  # fmt: skip


def _check(job: Work, staging: Staging) -> Callable[[Path], None]:
    """What the kind of stage looks at before an artifact appears."""
    if isinstance(job, DistillJob):
        return lambda directory: distill_stage.check(job, directory)
    kind, last = KINDS[type(job)], staging.journal()[-1]["state"]
    leaving = None
    if kind.keeps_last_state:
        assert job.walked is not None
        start = inputs.enter(job.skeleton, job.walked, job.needs_original, with_plain=job.follows_plain)
        leaving = inputs.resume(start, job.skeleton.num_blocks, staging.read_state(last))
    return lambda directory: kind.check(job, directory, leaving)


def _contents(job: Work, entries: list[dict[str, Any]]) -> Contents:
    checkpoint, calibration = job.checkpoint, job.calibration
    recipe = job.recipe
    layers = {row["name"]: LayerRecord(**row) for entry in entries for row in entry["layers"]}
    found = Contents(
        config=job.stored_config if isinstance(job, DistillJob) else KINDS[type(job)].config(job),
        aux_files=checkpoint.aux_files(),
        recipe=job.told.placeless(),
        recipe_hash=job.told.hash(),
        recipe_yaml=job.told.to_yaml(),
        parents=[*lineage.ancestors(checkpoint), lineage.parent(checkpoint, recipe.stages[0].kind)],
        source_shapes={name: info.shape for name, info in checkpoint.source_index.items()},
        ledger={name: LedgerEntry(**row) for entry in entries for name, row in entry["ledger"].items()},
        layers=list(layers.values()),
        fallbacks=[Fallback(**row) for entry in entries for row in entry["fallbacks"]],
        calibration=None
        if calibration is None
        else CalibrationRecord(
            name=calibration.name,
            sha256=calibration.sha256,
            samples=calibration.tokens.shape[0],
            seq_len=calibration.tokens.shape[1],
            seed=calibration.seed,
            parts=[CalibrationPart(**asdict(part)) for part in calibration.parts],
        ),
        calibration_sketch=job.calibration_sketch,
        created_with=f"compress {compress.__version__}",
        environment=environment(job.skeleton.dtype),
        attachments=lineage.carried(checkpoint, recipe.stages[0].kind)
        | {name: text.encode() for entry in entries for name, text in entry.get("attachments", {}).items()},
    )
    return distill_stage.finished(job, found, entries) if isinstance(job, DistillJob) else found

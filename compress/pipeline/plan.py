"""plan(): what a run would make and cost; writes nothing, hashes the source only where statistics of it may be kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.artifact import store
from compress.artifact.output import existing
from compress.errors import UserError
from compress.models.skeleton import LinearSpec
from compress.pipeline.curvature_plan import curvature_disk, curvature_memory
from compress.pipeline.cut_plan import CutPlan, depth_plan, experts_plan
from compress.pipeline.depth_job import DepthJob
from compress.pipeline.distill_job import DistillJob
from compress.pipeline.distill_plan import DistillPlan, distill_plan
from compress.pipeline.duration import seconds_estimate
from compress.pipeline.experts_job import ExpertsJob
from compress.pipeline.job import Job
from compress.pipeline.memory import largest_block, largest_linear, streaming, tuning, widest_input
from compress.pipeline.prune_job import PruneJob
from compress.pipeline.prune_plan import PrunePlan, prune_plan
from compress.pipeline.refine_plan import refine_memory
from compress.pipeline.resolve import resolve
from compress.pipeline.routing import experts_per_token
from compress.pipeline.tables_stage import ROWS_AT_A_TIME
from compress.pipeline.width_job import WidthJob
from compress.pipeline.width_plan import WidthPlan, width_plan
from compress.pipeline.work import Problem, Whole, Work
from compress.quantization.configs import AutoRoundConfig, AwqConfig, GptqConfig, HadamardConfig, SmoothQuantConfig
from compress.recipe import Recipe
from compress.types import FP8_TILE, Scheme


@dataclass(frozen=True, slots=True)
class PlannedLinear:
    """One linear: its scheme and stored bits per weight, or the reason why it stays as it is (then its own bits)."""

    name: str
    block: int
    in_features: int
    out_features: int
    scheme: Scheme | None
    bits_per_weight: float
    reason: str | None


@dataclass(frozen=True, slots=True)
class Plan:
    """bits_per_weight counts codes, scales and zero points of the quantised linears; file_bits_per_weight everything.

    peak_memory_bytes is anonymous memory above the interpreter and its libraries. problems forbid the run;
    hint says what to do about the first of them.
    """

    model: str
    method: str
    linears: list[PlannedLinear]
    bits_per_weight: float
    file_bits_per_weight: float
    output_bytes: int
    source_bytes: int
    peak_memory_bytes: int
    seconds_estimate: float
    problems: list[str]
    output: Path
    hint: str = ""
    refine_memory_bytes: int | None = None
    """What refining needs with the whole model in memory, where it is asked for; peak_memory_bytes covers it."""
    curvature_memory_bytes: int | None = None
    """What measuring the curvature over outputs needs, where it is asked for; peak_memory_bytes covers it."""
    curvature_disk_bytes: int | None = None
    """What it writes beside the output, which goes when the run ends."""
    experts_per_token: tuple[int, int] | None = None
    """How many experts a calibration token goes through, of how many; None where none learn."""


AnyPlan = Plan | PrunePlan | WidthPlan | CutPlan | DistillPlan

PLANS: dict[type[Work], Callable[[Any, Path, Sequence[Problem]], AnyPlan]] = {
    PruneJob: prune_plan,
    WidthJob: width_plan,
    DepthJob: depth_plan,
    ExpertsJob: experts_plan,
    DistillJob: distill_plan,
}
"""Of every kind of work but quantising: what lays its plan out, given the output and what forbids the run."""


def plan(
    recipe: Recipe,
    *,
    model: str | Path | None = None,
    output: str | Path | None = None,
    device: str = "auto",
    restart: bool = False,
    scored: bool = False,
    whole: Whole | None = None,
) -> AnyPlan:
    """Lays out a run. Its `problems` are what `run` would refuse; other user errors are raised as in `run`.

    scored: whether the run ends with scoring, and so takes up a version that was left without scores.
    whole: as in `run`.
    Whether an artifact in the output is of the same source is left to the run, which hashes it.
    """
    job = resolve(recipe, model=model, output=output, device=device, whole=whole)
    if isinstance(job, Job):
        return _quantisation(job, restart, scored)
    return PLANS[type(job)](job, _output(job, restart, scored), job.problems or _output_problems(job, restart))


def _quantisation(job: Job, restart: bool, scored: bool) -> Plan:
    specs = [*job.skeleton.linears(), *job.tables]
    linears = [_planned(job, spec) for spec in specs]
    quantized = [spec for spec in specs if spec.name in job.schemes and job.schemes[spec.name].fits(spec.in_features)]
    stored = {spec.name: job.stored_bits(spec) for spec in quantized}
    replaced = sum(job.checkpoint.index[spec.weight].nbytes for spec in quantized)
    copies, index = job.skeleton.stored_copies(), job.checkpoint.index
    source_bytes = job.checkpoint.nbytes
    added = sum(index[name].nbytes for name in index.keys() - job.checkpoint.source_index.keys())
    removed = replaced + sum(index[name].nbytes for name in copies)
    output_bytes = source_bytes + added - removed + sum(stored.values()) // 8
    problems = job.problems or _output_problems(job, restart)
    refining = None if job.stage.refine is None else refine_memory(job)
    curving = curvature_memory(job)
    return Plan(
        model=job.model_name,
        method=job.method_name,
        linears=linears,
        bits_per_weight=job.bits_per_weight,
        file_bits_per_weight=8 * output_bytes / job.skeleton.parameters(),
        output_bytes=output_bytes,
        source_bytes=source_bytes,
        peak_memory_bytes=max(_peak_memory(job), curving, refining or 0),
        seconds_estimate=seconds_estimate(job),
        problems=[problem.message for problem in problems],
        output=_output(job, restart, scored),
        hint=problems[0].hint if problems else "",
        refine_memory_bytes=refining,
        curvature_memory_bytes=curving or None,
        curvature_disk_bytes=curvature_disk(job) or None,
        experts_per_token=experts_per_token(job) if job.needs_blocks else None,
    )


def _output_problems(job: Work, restart: bool) -> list[Problem]:
    """What forbids the named output. Raises what `run` would raise about the calibration text."""
    identity = job.identity(hashed=False)
    if job.output is not None:
        try:
            existing(job.output, identity, restart=restart)
        except UserError as error:
            return [Problem(error.message, error.hint)]
    return []


def _output(job: Work, restart: bool, scored: bool) -> Path:
    if job.output is not None:
        return job.output
    if job.problems or not job.family_directory.is_dir():
        return job.family_directory / "v1"
    return store.next_version(job.family_directory, job.identity(hashed=False), restart=restart, scored=scored)


def _planned(job: Job, spec: LinearSpec) -> PlannedLinear:
    scheme = job.schemes.get(spec.name)
    itemsize = job.checkpoint.index[spec.weight].dtype.itemsize
    reason = job.reasons.get(spec.name)
    if scheme is not None and not scheme.fits(spec.in_features):
        reason = f"group size {scheme.group_size or FP8_TILE} does not divide {spec.in_features}"
        scheme = None
    bits = 8.0 * itemsize if scheme is None else job.stored_bits(spec) / (spec.in_features * spec.out_features)
    return PlannedLinear(spec.name, spec.block, spec.in_features, spec.out_features, scheme, bits, reason)


def _table_memory(job: Job, per_weight: int) -> int:
    """Of quantising the embedding or the head: a slab of rows, and what is stored, in slabs and as a whole."""
    slabs = ((min(spec.out_features, ROWS_AT_A_TIME) * spec.in_features, spec) for spec in job.tables)
    return max((weights * per_weight + 2 * job.stored_bits(spec) // 8 for weights, spec in slabs), default=0)


def _peak_memory(job: Job) -> int:
    """An upper estimate: the largest single tensor or block, activations between blocks, one linear's statistics."""
    per_weight = 4 * 5 + 8 + 1  # float32 weight and temporaries, int64 words, codes
    one_linear = max(largest_linear(job) * per_weight, _table_memory(job, per_weight))
    if not job.needs_blocks:
        return one_linear + max(info.nbytes for info in job.checkpoint.index.values())
    by_gptq = isinstance(job.rounding, GptqConfig)
    folded = isinstance(job.stage.method, AwqConfig | SmoothQuantConfig)
    rotated = isinstance(job.stage.method, HadamardConfig)  # checked in float32; turned tensors are made, not mapped
    itemsize, copies = job.skeleton.dtype.itemsize, 2 if job.needs_original else 1
    weights = largest_block(job) * (itemsize * copies + (4 if folded or rotated else 0))
    if isinstance(job.stage.method, AutoRoundConfig):
        weights += tuning(job)
    return one_linear + streaming(job) + weights + widest_input(job) ** 2 * 4 * (5 if by_gptq else 1)

"""What a pruning would make and cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.formats import bitmask
from compress.models.skeleton import LinearSpec
from compress.pipeline import mask_moments
from compress.pipeline.duration import SHARING, on_all_threads, product_rate
from compress.pipeline.inputs import compared_tokens
from compress.pipeline.memory import largest_block, largest_linear, streaming, widest_input
from compress.pipeline.prune_job import PruneJob
from compress.pipeline.work import Problem
from compress.pruning.configs import SparseGptConfig, from_model

# Choosing a mask costs about as much per weight as so many operations of a product do.
MASK_OPERATIONS = 2000


@dataclass(frozen=True, slots=True)
class PrunedShape:
    """One linear: the share of its weights that will be zero, or the reason why it stays as it is."""

    name: str
    block: int
    in_features: int
    out_features: int
    sparsity: float | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """zeros: weights that will be zero, of `parameters` in all. In a dense `format` they take their place in the file.

    peak_memory_bytes is anonymous memory above the interpreter and its libraries. problems forbid the run; hint says
    what to do about the first of them.
    """

    model: str
    method: str
    sparsity: str
    format: str
    linears: list[PrunedShape]
    zeros: int
    parameters: int
    output_bytes: int
    source_bytes: int
    peak_memory_bytes: int
    seconds_estimate: float
    problems: list[str]
    output: Path
    hint: str = ""


def prune_plan(job: PruneJob, output: Path, problems: Sequence[Problem]) -> PrunePlan:
    """Lays out a pruning; problems are what forbids it."""
    index = job.checkpoint.index
    linears = [_planned(job, spec) for spec in job.skeleton.linears()]
    saved = sum(_saved(job, each) for each in linears) if job.stage.format == bitmask.FORMAT else 0
    return PrunePlan(
        model=job.model_name,
        method=job.method_name,
        sparsity=job.sparsity.name,
        format=job.stage.format,
        linears=linears,
        zeros=sum(_zeros(each) for each in linears),
        parameters=job.skeleton.parameters(),
        output_bytes=job.checkpoint.nbytes - sum(index[name].nbytes for name in job.skeleton.stored_copies()) - saved,
        source_bytes=job.checkpoint.nbytes,
        peak_memory_bytes=_peak_memory(job),
        seconds_estimate=_operations(job) * on_all_threads(product_rate),
        problems=[problem.message for problem in problems],
        output=output,
        hint=problems[0].hint if problems else "",
    )


def _planned(job: PruneJob, spec: LinearSpec) -> PrunedShape:
    sparsity, reason = job.sparsities.get(spec.name), job.reasons.get(spec.name)
    if sparsity is not None and not sparsity.fits(spec.in_features):
        reason = f"the pattern {sparsity.name} does not divide {spec.in_features}"
        sparsity = None
    share = None if sparsity is None else sparsity.share
    return PrunedShape(spec.name, spec.block, spec.in_features, spec.out_features, share, reason)


def _zeros(linear: PrunedShape) -> int:
    return round((linear.sparsity or 0.0) * linear.in_features * linear.out_features)


def _saved(job: PruneJob, linear: PrunedShape) -> int:
    """Bytes by which the packed container is smaller than this linear's dense weight; 0 where it would not be."""
    dense = job.checkpoint.index[f"{linear.name}.weight"]
    weights = linear.in_features * linear.out_features
    nonzero, rows = weights - _zeros(linear), linear.out_features
    packed = bitmask.stored_bytes(rows, linear.in_features, nonzero, dense.nbytes // weights)
    return max(0, dense.nbytes - packed)


def _peak_memory(job: PruneJob) -> int:
    """An upper estimate: the largest block, activations between blocks, one linear with its scores and statistics."""
    one_linear = largest_linear(job) * 4 * 8
    whole = from_model(job.stage.method)
    if not job.needs_blocks and not whole:
        return one_linear
    squared = whole or isinstance(job.stage.method, SparseGptConfig)
    statistics = widest_input(job) ** 2 * 4 * 6 if squared else 0
    weights = largest_block(job) * job.skeleton.dtype.itemsize * (2 if job.needs_original else 1)
    return one_linear + streaming(job) + weights + statistics


def _operations(job: PruneJob) -> float:
    specs = [spec for spec in job.skeleton.linears() if spec.name in job.sparsities]
    weights = float(sum(spec.in_features * spec.out_features for spec in specs))
    work = MASK_OPERATIONS * weights
    wanted, method = job.stage.calibration, job.stage.method
    if wanted is None:
        return work
    tokens = wanted.samples * wanted.seq_len
    forward = 2.0 * sum(spec.in_features * spec.out_features for spec in job.skeleton.linears())
    if from_model(method):
        solved = sum(float(spec.out_features) * spec.in_features**2 for spec in specs)
        work += 2 * (4 + method.refit_steps) * solved if isinstance(method, SparseGptConfig) else 0.0
        return work + (0.0 if mask_moments.there(job) else moments_operations(job, tokens))
    if not isinstance(method, SparseGptConfig):
        return work + tokens * forward
    compared = compared_tokens(tokens) if job.needs_original else 0
    squares = sum(float(spec.in_features) ** 2 for spec in specs if not spec.name.endswith(SHARING))
    cubes = sum(float(spec.out_features) * spec.in_features**2 for spec in specs)
    products = (tokens + compared) * forward + (tokens + 2 * compared) * squares
    return work + products + 2 * (4 + method.refit_steps) * cubes


def moments_operations(job: mask_moments.AnyJob, tokens: int) -> float:
    """Floating-point operations of measuring what all linears of the model read on so many tokens."""
    specs = job.skeleton.linears()
    forward = 2.0 * sum(spec.in_features * spec.out_features for spec in specs)
    return tokens * (forward + sum(float(spec.in_features) ** 2 for spec in specs if not spec.name.endswith(SHARING)))

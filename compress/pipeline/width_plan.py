"""What a width cut would make and cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.models.skeleton import LinearSpec
from compress.pipeline import mask_moments, width_channels
from compress.pipeline.duration import on_all_threads, product_rate
from compress.pipeline.inputs import CHUNK_TOKENS, compared_tokens
from compress.pipeline.memory import largest_block, largest_linear, streaming, widest_input
from compress.pipeline.prune_plan import moments_operations
from compress.pipeline.routing import experts_per_token
from compress.pipeline.width_job import WidthJob
from compress.pipeline.width_shape import WidthCut
from compress.pipeline.work import Problem
from compress.pruning.width import ROUNDS


@dataclass(frozen=True, slots=True)
class NarrowShape:
    """One linear: its shape now, and what it will be."""

    name: str
    block: int
    in_features: int
    out_features: int
    kept_in: int
    kept_out: int


@dataclass(frozen=True, slots=True)
class WidthPlan:
    """keep: the share of all parameters asked for; cut: what is realisable nearest below. Other fields as in PrunePlan.

    peak_memory_bytes is anonymous memory above the interpreter and its libraries.
    """

    model: str
    method: str
    keep: float
    cut: WidthCut
    linears: list[NarrowShape]
    output_bytes: int
    source_bytes: int
    peak_memory_bytes: int
    seconds_estimate: float
    problems: list[str]
    output: Path
    hint: str = ""


def width_plan(job: WidthJob, output: Path, problems: Sequence[Problem]) -> WidthPlan:
    """Lays out a width cut; problems are what forbids it."""
    index = job.checkpoint.index
    specs = job.skeleton.linears()
    lost = (job.cut.all_parameters - job.cut.parameters) * index[specs[0].weight].dtype.itemsize
    assert job.stage.keep is not None
    return WidthPlan(
        model=job.model_name,
        method=job.method_name,
        keep=job.stage.keep,
        cut=job.cut,
        linears=[_planned(job, spec) for spec in specs],
        output_bytes=job.checkpoint.nbytes - sum(index[name].nbytes for name in job.skeleton.stored_copies()) - lost,
        source_bytes=job.checkpoint.nbytes,
        peak_memory_bytes=_peak_memory(job),
        seconds_estimate=_operations(job) * on_all_threads(product_rate),
        problems=[problem.message for problem in problems],
        output=output,
        hint=problems[0].hint if problems else "",
    )


def _planned(job: WidthJob, spec: LinearSpec) -> NarrowShape:
    stored = (spec.out_features, spec.in_features)
    turned = job.layout.turned
    found = job.cut.shape(job.layout, spec.weight, stored[::-1] if turned else stored)
    kept_out, kept_in = found[::-1] if turned else found
    return NarrowShape(spec.name, spec.block, spec.in_features, spec.out_features, kept_in, kept_out)


def _peak_memory(job: WidthJob) -> int:
    """An upper estimate: two of the largest block, activations between blocks, one linear with its statistics."""
    blocks = (2 + job.follows_plain) * largest_block(job) * job.skeleton.dtype.itemsize
    places = 2 * job.skeleton.num_blocks + 1 if job.cut.narrows else 0  # norms, with two matrices each
    choosing = job.cut.all_hidden**2 * 4 * (2 * places + 6 * bool(places))
    return largest_linear(job) * 4 * 6 + streaming(job) + blocks + max(widest_input(job) ** 2 * 4 * 8, choosing)


def _operations(job: WidthJob) -> float:
    wanted = job.stage.calibration
    assert wanted is not None
    tokens = wanted.samples * wanted.seq_len
    compared = compared_tokens(tokens)
    specs = job.skeleton.linears()
    among = experts_per_token(job) or (1, 1)
    passed = {spec.name: 1.0 if spec.expert is None else among[0] / among[1] for spec in specs}
    forward = 2.0 * sum(passed[spec.name] * spec.in_features * spec.out_features for spec in specs)
    consumers = [spec for spec in specs if job.consumes(spec)]
    squares = sum(passed[spec.name] * float(spec.in_features) ** 2 for spec in consumers)
    cubes = sum(float(spec.in_features) ** 2 * (2 * spec.in_features + spec.out_features) for spec in consumers)
    choosing = 0.0
    if job.cut.narrows:
        places, hidden = 2 * job.skeleton.num_blocks + 1, float(job.cut.all_hidden)
        measuring = 0.0 if width_channels.there(job) else tokens * (forward + places * hidden**2)
        choosing = measuring + places * (ROUNDS + 2) * 3 * hidden**3
        squares += places * hidden**2
        cubes += sum(hidden**2 * (2 * hidden + spec.out_features) for spec in specs if spec.in_features == hidden)
    if job.moments is not None:
        measuring = 0.0 if mask_moments.there(job) else moments_operations(job, tokens)
        return measuring + (2 + job.follows_plain) * min(tokens, CHUNK_TOKENS) * forward + 2 * (ROUNDS + 3) * cubes
    forwards = tokens + compared * (1 if among == (1, 1) else 2)  # neurons of experts are chosen in a pass of their own
    return choosing + forwards * forward + (tokens + 3 * compared) * squares + 2 * (ROUNDS + 3) * cubes

"""What a cut would make and cost that is counted in whole units: blocks, or experts of every block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from compress.pipeline import depth_choice, experts_error, stats_cache
from compress.pipeline.depth_choice import LOSS_TOKENS
from compress.pipeline.depth_job import DepthJob
from compress.pipeline.duration import on_all_threads, product_rate
from compress.pipeline.experts_job import EXPERTS, ExpertsJob
from compress.pipeline.memory import largest_block, largest_linear, streaming
from compress.pipeline.work import Problem, Work


@dataclass(frozen=True, slots=True)
class CutPlan:
    """keep: the share of all parameters asked for; achieved: the nearest realisable at or below.

    kept of all_units stay, which `units` names. Other fields as in PrunePlan.
    """

    model: str
    method: str
    keep: float
    achieved: float
    units: str
    kept: int
    all_units: int
    parameters: int
    all_parameters: int
    output_bytes: int
    source_bytes: int
    peak_memory_bytes: int
    seconds_estimate: float
    problems: list[str]
    output: Path
    hint: str = ""
    linears: list[str] = field(default_factory=list)
    """Empty: which units go is chosen while the run reads its text, and no linear changes its shape."""


def depth_plan(job: DepthJob, output: Path, problems: Sequence[Problem]) -> CutPlan:
    """Lays out a depth cut; problems are what forbids it."""
    cut, index = job.cut, job.checkpoint.index
    assert job.stage.keep is not None
    assert job.stage.calibration is not None
    lost = cut.all_parameters - cut.parameters
    itemsize = index[job.skeleton.linears(0)[0].weight].dtype.itemsize
    tokens = job.stage.calibration.samples * job.stage.calibration.seq_len
    per_token = 2.0 * sum(spec.in_features * spec.out_features for spec in job.skeleton.linears())
    choosing = float(tokens)
    streams = 0
    if job.method.choose == "loss":
        measured, streams = min(tokens, LOSS_TOKENS), len(cut.candidates) + 2
        choosing = cut.drop * measured * (1 + len(cut.candidates) / 2)
    choosing = 0.0 if depth_choice.there(job) else choosing
    hidden = job.skeleton.linears(0)[0].in_features
    return CutPlan(
        model=job.model_name,
        method=job.method_name,
        keep=job.stage.keep,
        achieved=cut.keep,
        units="blocks",
        kept=cut.blocks - cut.drop,
        all_units=cut.blocks,
        parameters=cut.parameters,
        all_parameters=cut.all_parameters,
        output_bytes=stored_bytes(job) - lost * itemsize,
        source_bytes=job.checkpoint.nbytes,
        peak_memory_bytes=(largest_block(job) + streams * LOSS_TOKENS * hidden) * job.skeleton.dtype.itemsize
        + largest_linear(job) * 4
        + streaming(job),
        seconds_estimate=(tokens + choosing) * per_token * on_all_threads(product_rate),
        problems=[problem.message for problem in problems],
        output=output,
        hint=problems[0].hint if problems else "",
    )


def experts_plan(job: ExpertsJob, output: Path, problems: Sequence[Problem]) -> CutPlan:
    """Lays out a cut in experts; problems are what forbids it."""
    cut = job.cut
    assert job.stage.keep is not None
    assert job.stage.calibration is not None
    experts = next(spec for spec in job.skeleton.linears() if spec.expert is not None)
    lost = (cut.all_parameters - cut.parameters) * job.checkpoint.index[experts.weight].dtype.itemsize
    tokens = job.stage.calibration.samples * job.stage.calibration.seq_len
    passed = 2 * tokens
    if job.method.measured == "model":
        measured = 0 if stats_cache.there(job, EXPERTS, {}) else 2 * tokens
        passed = measured + job.stage.calibration.seq_len
    per_round = int(job.skeleton.config.num_experts_per_tok)
    chosen = per_round / cut.experts
    if job.method.choose == "error":
        rounds = min(experts_error.ROUNDS, (cut.experts - cut.kept) // cut.groups)
        passed += rounds * (per_round + 2) * min(tokens, experts_error.TOKENS)  # of each expert its own tokens
    per_token = sum(
        2.0 * spec.in_features * spec.out_features * (1.0 if spec.expert is None else chosen)
        for spec in job.skeleton.linears()
    )
    return CutPlan(
        model=job.model_name,
        method=job.method_name,
        keep=job.stage.keep,
        achieved=cut.keep,
        units="experts of every mixture",
        kept=cut.kept,
        all_units=cut.experts,
        parameters=cut.parameters,
        all_parameters=cut.all_parameters,
        output_bytes=stored_bytes(job) - lost,
        source_bytes=job.checkpoint.nbytes,
        peak_memory_bytes=largest_block(job) * job.skeleton.dtype.itemsize + largest_linear(job) * 4 + streaming(job),
        seconds_estimate=passed * per_token * on_all_threads(product_rate),
        problems=[problem.message for problem in problems],
        output=output,
        hint=problems[0].hint if problems else "",
    )


def stored_bytes(job: Work) -> int:
    """Bytes of the source's tensors, stored copies of tied ones left out."""
    index = job.checkpoint.index
    return job.checkpoint.nbytes - sum(index[name].nbytes for name in job.skeleton.stored_copies())

"""What a distillation would train and cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from compress.distillation import processes
from compress.distillation.configs import OnPolicyConfig
from compress.models.checkpoint import Checkpoint
from compress.pipeline.distill_job import CHUNK, DistillJob
from compress.pipeline.distill_teacher import MOST_KEPT
from compress.pipeline.duration import on_all_threads, product_rate
from compress.pipeline.work import Problem

# Backward takes twice a forward where all weights learn; adapters need no gradient of the weights themselves.
FORWARDS_PER_STEP = {True: 2.3, False: 3.0}


@dataclass(frozen=True, slots=True)
class DistillPlan:
    """trained: values that learn, of `parameters`. steps: None where they are measured from `minutes` at the start.

    windows: for training; held_out: only measured on. Other fields as in PrunePlan.
    """

    model: str
    teacher: str
    method: str
    weights: str
    trained: int
    parameters: int
    minutes: float | None
    steps: int | None
    tokens_per_step: int
    windows: int
    held_out: int
    linears: list[str]
    output_bytes: int
    source_bytes: int
    peak_memory_bytes: int
    seconds_estimate: float
    problems: list[str]
    output: Path
    hint: str = ""


def distill_plan(job: DistillJob, output: Path, problems: Sequence[Problem]) -> DistillPlan:
    """Lays out a distillation; problems are what forbids it."""
    index, specs, stage = job.checkpoint.index, job.skeleton.linears(), job.stage
    rank, parameters = stage.lora_rank, job.skeleton.parameters()
    trained = sum(rank * (spec.in_features + spec.out_features) for spec in specs) if rank else parameters
    windows = len(job.calibration.tokens) - stage.calibration.held_out
    return DistillPlan(
        model=job.model_name,
        teacher=job.teacher_name,
        method=job.method_name,
        weights=job.label,
        trained=trained,
        parameters=parameters,
        minutes=stage.minutes,
        steps=stage.steps,
        tokens_per_step=job.tokens_per_step,
        windows=windows,
        held_out=stage.calibration.held_out,
        linears=[spec.name for spec in specs],
        output_bytes=job.checkpoint.nbytes - sum(index[name].nbytes for name in job.skeleton.stored_copies()),
        source_bytes=job.checkpoint.nbytes,
        peak_memory_bytes=_peak_memory(job, trained),
        seconds_estimate=_seconds(job, windows),
        problems=[problem.message for problem in problems],
        output=output,
        hint=problems[0].hint if problems else "",
    )


def _peak_memory(job: DistillJob, trained: int) -> int:
    """An upper estimate for all processes: both models, six copies of what learns, one chunk's activations per thread,
    kept states."""
    itemsize, threads = job.compute_dtype.itemsize, torch.get_num_threads()
    config, tokens = job.checkpoint.config, CHUNK * job.stage.calibration.seq_len
    width = sum(spec.in_features + spec.out_features for spec in job.skeleton.linears())
    chunk = tokens * (2 * width * itemsize + 8 * 4 * job.skeleton.vocabulary)
    models = (job.skeleton.parameters() + _parameters(job.teacher)) * itemsize
    states = job.calibration.tokens.numel() * int(config.get("hidden_size") or 0) * itemsize
    one = models + 4 * trained * (5 + threads) + threads * chunk + (states if states <= MOST_KEPT else 0)
    return processes.wanted() * one


def _seconds(job: DistillJob, windows: int) -> float:
    stage = job.stage
    if stage.steps is None:
        assert stage.minutes is not None
        return 60.0 * stage.minutes
    per_token = 2.0 * job.skeleton.parameters() * FORWARDS_PER_STEP[bool(stage.lora_rank)]
    if isinstance(stage.method, OnPolicyConfig):  # what is written is new in every step, for the teacher too
        tokens = stage.steps * stage.batch_size * (stage.method.prompt_tokens + stage.method.max_tokens)
        writing = 2.0 * (job.skeleton.parameters() + _parameters(job.teacher))
        return tokens * (per_token + writing) * on_all_threads(product_rate)
    tokens = stage.steps * stage.batch_size * stage.calibration.seq_len
    seen = min(tokens, windows * stage.calibration.seq_len)
    return (tokens * per_token + 2.0 * seen * _parameters(job.teacher)) * on_all_threads(product_rate)


def _parameters(checkpoint: Checkpoint) -> int:
    return sum(info.nbytes // info.dtype.itemsize for info in checkpoint.index.values())

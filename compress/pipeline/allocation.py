"""The sparsity of every block, found from the whole model before the loop."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from compress.calibration.staged import StagedForward
from compress.calibration.statistics import square_mean
from compress.errors import WorkError
from compress.pipeline import inputs
from compress.pipeline.block import Workers, stages
from compress.pipeline.prune_job import SHARES, PruneJob
from compress.pipeline.source import read_weight
from compress.progress import Progress
from compress.pruning import allocation


def decide(job: PruneJob, workers: Workers, progress: Progress) -> dict[str, Any] | None:
    """The sparsity of each block and what it follows from; None where all have the same."""
    kind = job.stage.allocation
    if kind == "uniform":
        return None
    measure = _outlier_ratios if kind == "owl" else _tail_exponents
    progress.begin(f"sharing out the sparsity ({kind})", job.skeleton.num_blocks)
    found = measure(job, workers, progress)
    progress.end()
    specs = {block: [s for s in job.skeleton.linears(block) if s.name in job.sparsities] for block in found}
    sizes = [sum(spec.in_features * spec.out_features for spec in specs[block]) for block in found]
    shared = allocation.by_outliers if kind == "owl" else allocation.by_spectra
    shares = shared(list(found.values()), sizes, job.sparsity.share)
    return {
        SHARES: {str(block): share for block, share in zip(found, shares, strict=True)},
        "measured": {str(block): value for block, value in found.items()},
    }


def _outlier_ratios(job: PruneJob, workers: Workers, progress: Progress) -> dict[int, float]:
    """The share of outliers among the weights of each block that is pruned, times the norms of their inputs."""
    assert job.calibration is not None
    entering = inputs.enter(job.skeleton, job.calibration.tokens, False)
    found: dict[int, float] = {}
    for block in range(job.skeleton.num_blocks):
        module = job.skeleton.materialise(block)
        live = job.skeleton.modules(block, module)
        specs = {s.name: s for s in job.skeleton.linears(block) if s.name in job.sparsities}
        forward = StagedForward(entering.runs(job.skeleton, module), {n: live[n] for n in specs}, workers.count)
        squares: dict[str, Tensor] = {}
        with closing(stages(forward)) as reached:
            for stage in reached:
                squares[stage.name] = square_mean(stage.inputs, workers.pool)
        total, count = 0.0, 0
        for name, square in squares.items():
            scores = allocation.importance(read_weight(job.checkpoint, specs[name]), square)
            total, count = total + float(scores.sum(dtype=torch.float64)), count + scores.numel()
        if count:
            beyond = sum(
                allocation.outliers(read_weight(job.checkpoint, specs[name]), square, total / count)
                for name, square in squares.items()
            )
            found[block] = beyond / count
        entering = entering.advanced(forward.outputs)
        progress.advance(f"block {block}")
    return found


def _tail_exponents(job: PruneJob, workers: Workers, progress: Progress) -> dict[int, float]:
    """The mean exponent of the spectra of each block's linears that are pruned."""
    found: dict[int, float] = {}
    for block in range(job.skeleton.num_blocks):
        specs = [spec for spec in job.skeleton.linears(block) if spec.name in job.sparsities]
        weights = (read_weight(job.checkpoint, spec) for spec in specs)
        alphas = list(workers.pool.map(allocation.tail_exponent, weights))
        if not all(map(_is_finite, alphas)):
            raise WorkError(f"a linear of block {block} has no spectrum to measure", "use allocation: uniform or owl")
        if alphas:
            found[block] = sum(alphas) / len(alphas)
        progress.advance(f"block {block}")
    return found


def _is_finite(value: float) -> bool:
    return value - value == 0

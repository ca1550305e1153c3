"""What measuring the curvature over the outputs costs: a forward and a backward pass of a few windows."""

from __future__ import annotations

import torch

from compress.pipeline.curvature import WIDEST, windows
from compress.pipeline.job import Job
from compress.pipeline.memory import largest_block, widest_input

FORWARDS = 3  # what a forward and a backward pass cost together, a forward that keeps nothing left out


def curvature_memory(job: Job) -> int:
    """Bytes beside the block itself: hidden states between all blocks, one block's graphs and moments, logits."""
    if not windows(job) or job.stage.calibration is None:
        return 0
    length, workers, skeleton = job.stage.calibration.seq_len, torch.get_num_threads(), job.skeleton
    hidden = int(job.checkpoint.config.get("hidden_size") or widest_input(job))
    states = windows(job) * length * hidden * (skeleton.num_blocks + 2) * skeleton.dtype.itemsize
    outputs = [spec.out_features for spec in skeleton.linears(0) if spec.expert is None]
    gradients = windows(job) * length * sum(outputs) * skeleton.dtype.itemsize
    moments = sum(width**2 for width in outputs if width <= WIDEST) * 4
    graph = workers * length * (10 * hidden + 5 * widest_input(job)) * 4
    return states + gradients + 2 * moments + graph + 5 * 4 * length * skeleton.vocabulary + 4 * largest_block(job)


def curvature_operations(job: Job) -> float:
    """Floating-point operations of matrix products, the descent's among them."""
    if not windows(job) or job.stage.calibration is None:
        return 0.0
    specs = [spec for spec in job.skeleton.linears() if spec.expert is None]
    hidden = int(job.checkpoint.config.get("hidden_size") or widest_input(job))
    once = 2.0 * sum(spec.in_features * spec.out_features for spec in specs)
    head = 2.0 * hidden * job.skeleton.vocabulary
    squares = 2.0 * sum(spec.out_features**2 for spec in specs if spec.out_features <= WIDEST)
    passes = (FORWARDS + 1) * once + FORWARDS * head + squares
    descent = (
        2.0 * 4 * sum(float(spec.out_features) ** 2 * spec.in_features for spec in specs if spec.out_features <= WIDEST)
    )
    return windows(job) * job.stage.calibration.seq_len * passes + descent

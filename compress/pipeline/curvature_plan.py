"""What measuring the curvature over the outputs costs: a forward and a backward pass of a few windows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compress.models.skeleton import LinearSpec
from compress.pipeline.curvature import measured_linears, windows
from compress.pipeline.job import Job
from compress.pipeline.memory import largest_block, widest_input
from compress.quantization import coupled

FORWARDS = 3  # what a forward and a backward pass cost together, a forward that keeps nothing left out


def curvature_memory(job: Job) -> int:
    """Bytes beside the block itself: hidden states between all blocks, one block's graphs and moments, logits."""
    if not windows(job) or job.stage.calibration is None:
        return 0
    length, workers, skeleton = job.stage.calibration.seq_len, torch.get_num_threads(), job.skeleton
    hidden = int(job.checkpoint.config.get("hidden_size") or widest_input(job))
    states = windows(job) * length * hidden * (skeleton.num_blocks + 2) * skeleton.dtype.itemsize
    blocks = [measured_linears(job, block) for block in range(skeleton.num_blocks)]
    gradients = windows(job) * length * skeleton.dtype.itemsize * max(_outputs(specs) for specs in blocks)
    moments = 4 * max(_squares(specs) for specs in blocks)
    graph = workers * length * (10 * hidden + 5 * widest_input(job)) * 4
    return states + gradients + 2 * moments + graph + 5 * 4 * length * skeleton.vocabulary + 4 * largest_block(job)


def curvature_disk(job: Job) -> int:
    """Bytes of the moments of all blocks, which lie beside the output until the run ends."""
    if not windows(job):
        return 0
    return 4 * sum(_squares(measured_linears(job, block)) for block in range(job.skeleton.num_blocks))


def curvature_operations(job: Job) -> float:
    """Floating-point operations of matrix products, the descent's among them."""
    if not windows(job) or job.stage.calibration is None:
        return 0.0
    linears = job.skeleton.linears()
    once = 2.0 * sum(spec.in_features * spec.out_features for spec in linears if spec.expert is None)
    hidden = int(job.checkpoint.config.get("hidden_size") or widest_input(job))
    head = 2.0 * hidden * job.skeleton.vocabulary
    specs = [spec for block in range(job.skeleton.num_blocks) for spec in measured_linears(job, block)]
    passes = (FORWARDS + 1) * once + FORWARDS * head + 2.0 * _squares(specs)
    products = coupled.SWEEPS + 1  # with the curvature, the pull at the start among them
    descent = 2.0 * products * sum(float(spec.out_features) ** 2 * spec.in_features for spec in specs)
    return windows(job) * job.stage.calibration.seq_len * passes + descent


def _squares(specs: Sequence[LinearSpec]) -> int:
    return sum(spec.out_features**2 for spec in specs)


def _outputs(specs: Sequence[LinearSpec]) -> int:
    return sum(spec.out_features for spec in specs)

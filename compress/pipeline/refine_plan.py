"""What refining costs: the one step that holds the whole model in memory."""

from __future__ import annotations

import math

import torch

from compress.pipeline.job import Job
from compress.pipeline.memory import largest_block, widest_input
from compress.pipeline.moves import DRAWN_WINDOWS, SHARES
from compress.pipeline.tuned_model import BATCH_TOKENS

FORWARDS = 3  # what a forward and a backward pass cost together


def refine_memory(job: Job) -> int:
    """An upper estimate in bytes, above the interpreter and its libraries."""
    assert job.stage.refine is not None
    assert job.stage.calibration is not None
    index, skeleton = job.checkpoint.index, job.skeleton
    names = [name for block in range(skeleton.num_blocks) for name in skeleton.block_tensors(block)]
    weights = sum(math.prod(index[name].shape) for name in names)
    specs = [spec for spec in skeleton.linears() if spec.name in job.schemes]
    codes = sum(spec.in_features * spec.out_features for spec in specs)
    scales = sum(job.integers(spec).groups(spec.in_features) * spec.out_features for spec in specs)
    itemsize, workers = skeleton.dtype.itemsize, torch.get_num_threads()
    hidden = int(job.checkpoint.config.get("hidden_size") or widest_input(job))
    tokens = job.stage.calibration.windows * job.stage.calibration.seq_len
    batch = max(BATCH_TOKENS, job.stage.calibration.seq_len)
    graph = skeleton.num_blocks * (10 * hidden + 5 * widest_input(job)) * 4
    held = weights * (itemsize * (1 + workers) + 4) + codes + scales * 6 * 4 + 2 * largest_block(job) * 4
    if job.stage.refine.code_rounds:  # gradients, promises and their magnitudes, and the codes before and after
        held += codes * (4 * 4 + 3)
    return held + 2 * tokens * hidden * 4 + workers * batch * (graph + 5 * 4 * skeleton.vocabulary)


def refine_operations(job: Job) -> float:
    """Floating-point operations of matrix products."""
    settings, wanted = job.stage.refine, job.stage.calibration
    assert settings is not None
    assert wanted is not None
    hidden = int(job.checkpoint.config.get("hidden_size") or widest_input(job))
    head = 2.0 * hidden * job.skeleton.vocabulary
    blocks = 2.0 * sum(spec.in_features * spec.out_features for spec in job.skeleton.linears())
    learned = settings.steps * settings.windows * wanted.seq_len
    held = max(1, round(wanted.samples * settings.held_out))
    checked = (min(settings.checks, settings.steps) + 1) * held * wanted.seq_len
    if settings.code_rounds:
        learned += DRAWN_WINDOWS * wanted.seq_len
    learned += settings.code_rounds * (wanted.windows - held) * wanted.seq_len
    checked += settings.code_rounds * len(SHARES) * held * wanted.seq_len
    once = wanted.windows * wanted.seq_len * blocks
    return learned * (FORWARDS * (blocks + head) + head) + checked * (blocks + 2 * head) + once

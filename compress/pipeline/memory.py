"""Parts of a run's peak memory that every kind of stage has, in bytes or in weights."""

from __future__ import annotations

import math

import torch

from compress.pipeline.inputs import CHUNK_TOKENS
from compress.pipeline.work import Work
from compress.recipe_sections import CalibrationConfig


def widest_input(work: Work) -> int:
    """Inputs of the widest linear."""
    return max(spec.in_features for spec in work.skeleton.linears())


def largest_linear(work: Work) -> int:
    """Weights of the largest linear."""
    return max(spec.in_features * spec.out_features for spec in work.skeleton.linears())


def largest_block(work: Work) -> int:
    """Weights of the largest block, norms and biases counted."""
    index, skeleton = work.checkpoint.index, work.skeleton
    blocks = range(skeleton.num_blocks)
    return max(sum(math.prod(index[name].shape) for name in skeleton.block_tensors(block)) for block in blocks)


def tuning(work: Work) -> int:
    """Bytes of a block whose rounding is learnt, besides the block itself and the activations between blocks."""
    wanted, workers = work.stage.calibration, torch.get_num_threads()
    assert wanted is not None
    hidden = int(work.checkpoint.config.get("hidden_size") or widest_input(work))
    graph = wanted.seq_len * (10 * hidden + 5 * widest_input(work)) * 4
    weight, offset, kept, gradient = 4, 4, 4, 4
    per_weight = weight + offset + kept + gradient + workers * (work.skeleton.dtype.itemsize + 3 * 4)
    return largest_block(work) * per_weight + workers * graph


def streaming(work: Work) -> int:
    """Bytes of the activations between and inside blocks, and of the chunk that statistics are taken from."""
    widest, itemsize = widest_input(work), work.skeleton.dtype.itemsize
    wanted = work.stage.calibration
    windows = wanted.windows if isinstance(wanted, CalibrationConfig) else None if wanted is None else wanted.samples
    tokens = 0 if wanted is None or windows is None else windows * wanted.seq_len
    hidden = int(work.checkpoint.config.get("hidden_size") or work.skeleton.linears()[0].in_features)
    inside = widest + 4 * hidden  # what a paused forward holds per token
    streamed = tokens + work.followed(tokens)
    return streamed * itemsize * (2 * hidden + inside) + CHUNK_TOKENS * widest * 8

"""A depth cut made concrete: how many blocks go, and among which the choice is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compress.models.skeleton import Skeleton
from compress.pipeline.cut_job import Cut, CutJob
from compress.pipeline.work import Problem
from compress.pruning.configs import DepthConfig
from compress.stages import PruneStage

DROPPED = "dropped"


@dataclass(frozen=True, slots=True)
class DepthCut(Cut):
    """`drop` of the blocks `candidates` go, of `blocks` in all; the candidates are equally large."""

    drop: int
    candidates: tuple[int, ...]
    blocks: int
    parameters: int
    all_parameters: int


@dataclass(frozen=True, kw_only=True)
class DepthJob(CutJob):
    """Everything a plan or a run of a depth cut needs. `decided` holds which blocks go once the run has chosen."""

    cut: DepthCut

    @property
    def method(self) -> DepthConfig:
        assert isinstance(self.stage.method, DepthConfig)
        return self.stage.method

    @property
    def dropped(self) -> list[int]:
        """The blocks that go, sorted; only once that is decided."""
        return list(self.decided[DROPPED])

    @property
    def kept(self) -> list[int]:
        """The blocks that stay, in order: the block of that number in the result is this one of the source."""
        return [block for block in range(self.cut.blocks) if block not in self.dropped]


def assign(stage: PruneStage, skeleton: Skeleton) -> tuple[DepthCut, list[Problem]]:
    """The cut nearest below what the stage asks for, and what forbids it."""
    method, blocks, total = stage.method, skeleton.num_blocks, skeleton.parameters()
    assert isinstance(method, DepthConfig)
    assert stage.keep is not None
    candidates = tuple(range(method.protect_first, blocks - method.protect_last))
    shapes = {block: _shape(skeleton, block) for block in candidates}
    problems = []
    if not candidates:
        message = f"all {blocks} blocks are protected: none is left to remove"
        problems.append(Problem(message, "lower `protect_first` or `protect_last` of the method"))
        return DepthCut(0, candidates, blocks, total, total), problems
    if other := next((block for block in candidates if shapes[block] != shapes[candidates[0]]), None):
        message = f"block {other} has other tensors than block {candidates[0]}: how many go would depend on which"
        problems.append(Problem(message, "protect the blocks that differ with `protect_first` or `protect_last`"))
    size = sum(shapes[candidates[0]].values())
    drop = math.ceil(round((1.0 - stage.keep) * total / size, 9))
    if drop > len(candidates):
        smallest = (total - len(candidates) * size) / total
        message = f"keep {stage.keep:g} would remove {drop} blocks, and only {len(candidates)} are not protected"
        problems.append(Problem(message, f"with these settings the smallest keep is {smallest:.3f}"))
        drop = len(candidates)
    return DepthCut(drop, candidates, blocks, total - drop * size, total), problems


def _shape(skeleton: Skeleton, block: int) -> dict[str, int]:
    """How many weights each tensor of a block has, by its name in the block."""
    prefix, index = skeleton.block_prefix(block), skeleton.checkpoint.index
    return {name.removeprefix(prefix): math.prod(index[name].shape) for name in skeleton.block_tensors(block)}


def config_of(job: DepthJob) -> dict[str, Any]:
    """config.json of the result: the source's with fewer blocks, and with what it says of each single block moved."""
    config, parsed, kept = dict(job.checkpoint.config), job.skeleton.config, job.kept
    config["n_layer" if "n_layer" in config else "num_hidden_layers"] = len(kept)
    types = getattr(parsed, "layer_types", None)
    if types is not None:  # spelled out, because its default would begin anew from the number of blocks
        config["layer_types"] = [types[block] for block in kept]
    if (step := getattr(parsed, "decoder_sparse_step", None)) is not None:
        listed: Sequence[int] = getattr(parsed, "mlp_only_layers", None) or ()
        dense = [new for new, block in enumerate(kept) if block in listed or (block + 1) % step]
        config |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    if (first := getattr(parsed, "first_k_dense_replace", None)) is not None:
        config["first_k_dense_replace"] = sum(block < first for block in kept)
    return config

"""Which blocks go. The whole model streams through, block by block, once or once for every block that goes.

By loss, every candidate is a stream of hidden states of its own, which leaves that block out: it begins where the
candidate stands, from what enters it, and runs beside the others. So each block is loaded once per round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compress.errors import WorkError
from compress.pipeline import inputs, stats_cache
from compress.pipeline.block import Workers
from compress.pipeline.depth_job import DROPPED, DepthJob
from compress.pipeline.inputs import Activations
from compress.progress import Progress
from compress.pruning import depth

LOSS_TOKENS = 4096
"""How many calibration tokens the losses are taken over."""

BASE = -1


def decide(job: DepthJob, workers: Workers, progress: Progress) -> dict[str, Any]:
    """The blocks that go, sorted, and the measure by which each was chosen.

    Raises WorkError where activations are not finite.
    """
    assert job.calibration is not None
    tokens = job.calibration.tokens
    if job.method.choose == "influence":
        scores = stats_cache.measured(
            job, "influence", {}, lambda: {"influence": _influences(job, tokens, workers, progress)}, progress
        )["influence"].tolist()
        chosen = sorted(job.cut.candidates, key=lambda block: (scores[block], block))[: job.cut.drop]
        return {DROPPED: sorted(chosen), "influence": {str(block): scores[block] for block in chosen}}
    windows = tokens[: max(1, LOSS_TOKENS // tokens.shape[1])]
    found = stats_cache.measured(job, "loss", _known(job), lambda: _by_loss(job, windows, workers, progress), progress)
    order, losses = (found[name][: job.cut.drop].tolist() for name in ("order", "loss"))
    return {DROPPED: sorted(order), "loss": {str(block): loss for block, loss in zip(order, losses, strict=True)}}


def there(job: DepthJob) -> bool:
    """Whether a run would find what it chooses by among the statistics that it keeps."""
    if job.method.choose == "influence":
        return stats_cache.there(job, "influence", {})
    return any(stats_cache.there(job, "loss", facts) for facts in _longer(job))


def _longer(job: DepthJob) -> list[dict[str, Any]]:
    """What the order depends on in which blocks go: that of more blocks begins with that of fewer."""
    candidates = list(job.cut.candidates)
    return [{"candidates": candidates, "drop": drop} for drop in range(job.cut.drop, len(candidates) + 1)]


def _known(job: DepthJob) -> dict[str, Any]:
    longer = _longer(job)
    there = (facts for facts in longer if (path := stats_cache.place(job, "loss", facts)) is not None and path.is_dir())
    return next(there, longer[0])


def _influences(job: DepthJob, tokens: Tensor, workers: Workers, progress: Progress) -> Tensor:
    """The mean influence of every block, in order: (blocks,) float64."""
    found, entering = [], inputs.enter(job.skeleton, tokens, False)
    progress.begin("measuring the influence of blocks", job.cut.blocks)
    for block in range(job.cut.blocks):
        module = job.skeleton.materialise(block)
        leaving = list(workers.pool.map(lambda run: run(), entering.runs(job.skeleton, module)))
        sums = list(workers.pool.map(depth.influence, entering.quantized, leaving))
        found.append(sum(sums) / sum(chunk.shape[0] * chunk.shape[1] for chunk in leaving))
        entering = entering.advanced(leaving)
        progress.advance(f"block {block}: {found[-1]:.4f}")
    progress.end()
    return torch.tensor(found, dtype=torch.float64)


def _by_loss(job: DepthJob, tokens: Tensor, workers: Workers, progress: Progress) -> dict[str, Tensor]:
    """The order in which blocks go, int64, and what the model without them loses after each, float64."""
    entering = inputs.enter(job.skeleton, tokens, False)
    reference: list[Tensor] = []
    dropped: dict[int, float] = {}
    progress.begin(f"choosing {job.cut.drop} of {len(job.cut.candidates)} blocks", job.cut.drop)
    while len(dropped) < job.cut.drop:
        streams = _round(job, entering, dropped, workers)
        if not reference:  # nothing is missing yet
            reference = streams[BASE]
        losses = {block: _loss(job, reference, hidden, workers) for block, hidden in streams.items() if block != BASE}
        best = min(losses, key=lambda block: (losses[block], block))
        dropped[best] = losses[best]
        progress.advance(f"block {best} goes: KL {losses[best]:.4f}")
    progress.end()
    order = torch.tensor(list(dropped), dtype=torch.int64)
    return {"order": order, "loss": torch.tensor(list(dropped.values()), dtype=torch.float64)}


def _round(
    job: DepthJob, entering: Activations, dropped: dict[int, float], workers: Workers
) -> dict[int, list[Tensor]]:
    """What leaves the last block, (samples, seq, hidden) per chunk: of the model as it is, and without each block."""
    streams = {BASE: entering.quantized}
    for block in (each for each in range(job.cut.blocks) if each not in dropped):
        module = job.skeleton.materialise(block)
        runs = {
            name: entering.standing_at(block, hidden).runs(job.skeleton, module) for name, hidden in streams.items()
        }
        leaving = list(workers.pool.map(lambda run: run(), [run for each in runs.values() for run in each]))
        without = streams[BASE]
        chunks = len(without)
        streams = {name: leaving[place * chunks : (place + 1) * chunks] for place, name in enumerate(streams)}
        if block in job.cut.candidates:
            streams[block] = without
    return streams


def _loss(job: DepthJob, reference: Sequence[Tensor], hidden: Sequence[Tensor], workers: Workers) -> float:
    """The mean KL in nats of the model's next-token distributions from those behind `hidden`; a window at a time."""
    windows = [
        (wanted[place : place + 1], found[place : place + 1])
        for wanted, found in zip(reference, hidden, strict=True)
        for place in range(wanted.shape[0])
    ]
    total = sum(depth.divergence(job.skeleton.head(wanted), job.skeleton.head(found)) for wanted, found in windows)
    mean = total / sum(wanted.shape[1] for wanted, _ in windows)
    if mean != mean:
        raise WorkError("the logits of the source model are not finite", "check the model with `compress eval`")
    return mean

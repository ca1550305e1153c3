"""How the outputs of each linear move the model's distributions together: second moments of gradients, on the original.

To second order the KL of a changed model is half the square of its logits' change under the softmax's own covariance.
A random vector of that covariance, drawn for every token and carried backwards through the model, has at the outputs
of a linear the second moments B = mean g g^T that its errors are weighed by (K-FAC, arXiv:1503.05671). The model is
walked block by block from the hidden states of one forward pass; the moments of a block lie in a file of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.calibration.statistics import collect
from compress.errors import WorkError
from compress.models.skeleton import Call, LinearSpec
from compress.pipeline import shards
from compress.pipeline.block import Workers
from compress.pipeline.job import Job
from compress.progress import Progress
from compress.quantization.configs import GptqConfig

WIDEST = 8192
"""Linears with more outputs than this have none measured: their moments would be larger than the block."""

FOLDER = "curvature"


def windows(job: Job) -> int:
    """How many calibration windows it is measured on: as asked for, at most all; 0 where nobody asks."""
    asked = job.rounding.curvature_windows if isinstance(job.rounding, GptqConfig) else 0
    return 0 if job.stage.calibration is None else min(asked, job.stage.calibration.samples)


def measured_linears(job: Job, block: int) -> list[LinearSpec]:
    """Of which linears of a block it is measured: the quantised ones, but for experts and the widest."""
    specs = job.skeleton.linears(block)
    return [s for s in specs if s.name in job.schemes and s.expert is None and s.out_features <= WIDEST]


def measured(job: Job, scratch: Path, workers: Workers, progress: Progress) -> Job:
    """The job with the moments of all blocks in `scratch`, where it is asked for; what a killed run left is used.

    Raises WorkError where gradients are not finite or the files cannot be written.
    """
    if not windows(job):
        return job
    path, walk = scratch / FOLDER, _walk(job, workers)
    made = 0

    def make(shard: int) -> dict[str, Tensor]:
        nonlocal made
        while made <= shard:
            found, made = next(walk), made + 1
        return found

    shards.complete(path, job.skeleton.num_blocks, make, progress, "measuring how outputs move the distributions")
    return replace(job, curvature=path)


def of_block(job: Job, block: int) -> Mapping[str, Tensor]:
    """B (out, out) float32 of the linears of this block, those of experts and the widest left out."""
    if job.curvature is None:
        return {}
    return shards.read(job.curvature, job.skeleton.num_blocks - 1 - block)


def _walk(job: Job, workers: Workers) -> Iterator[dict[str, Tensor]]:
    """The moments of the last block, of the one before, and so on."""
    assert job.calibration is not None
    skeleton, tokens = job.skeleton, job.calibration.tokens[: windows(job)]
    first, calls = skeleton.embed(tokens[:1])
    hidden = [[first, *(skeleton.embed(window[None])[0] for window in tokens[1:])]]
    for block in range(skeleton.num_blocks):
        module = skeleton.materialise(block)

        def through(state: Tensor, module: nn.Module = module, call: Call = calls[block]) -> Tensor:
            with torch.no_grad():
                return skeleton.run_block(module, state, call)

        hidden.append(list(workers.pool.map(through, hidden[-1])))
        skeleton.release(module)
    above = [_at_the_end(job, number, state) for number, state in enumerate(hidden.pop())]
    for block in reversed(range(skeleton.num_blocks)):
        found, above = _through(job, block, calls[block], hidden.pop(), above, workers)
        yield found


def _at_the_end(job: Job, number: int, leaving: Tensor) -> Tensor:
    """A draw of the softmax's covariance for every token, carried back to what leaves the last block."""
    state = leaving.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = job.skeleton.differentiable_head(state)
    share = torch.softmax(logits.detach(), -1)
    return torch.autograd.grad(logits, state, covariance_draw(share, job.recipe.seed, number))[0]


def covariance_draw(share: Tensor, seed: int, number: int) -> Tensor:
    """A random vector for every token whose covariance is the softmax's; share: the probabilities (..., vocabulary)."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
    drawn = torch.empty_like(share).bernoulli_(0.5, generator=generator).mul_(2).sub_(1).mul_(share.sqrt())
    return drawn - share * drawn.sum(-1, keepdim=True)


def _through(
    job: Job, block: int, call: Call, entering: list[Tensor], above: list[Tensor], workers: Workers
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The moments of this block by linear, and the gradients by what enters it."""
    skeleton = job.skeleton
    module = skeleton.materialise(block)
    live = skeleton.modules(block, module)
    names = [spec.name for spec in measured_linears(job, block)]
    outputs = threading.local()  # of the window that a thread is at

    def backwards(state: Tensor, pull: Tensor) -> tuple[Tensor, ...]:
        outputs.by_name = {}
        state = state.detach().clone().requires_grad_()
        with torch.enable_grad():
            leaving = skeleton.run_block(module, state, call)
        return torch.autograd.grad(leaving, [state, *(outputs.by_name[name] for name in names)], pull)

    with ExitStack() as hooks:
        for name in names:

            def keep(module: nn.Module, given: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                outputs.by_name[name] = output

            hooks.callback(live[name].register_forward_hook(keep).remove)
        found = list(workers.pool.map(backwards, entering, above))
    skeleton.release(module)
    chunks = {name: [by[place].flatten(0, -2) for by in found] for place, name in enumerate(names, start=1)}
    return {name: _moments(name, chunks[name], workers) for name in names}, [by[0] for by in found]


def _moments(name: str, gradients: list[Tensor], workers: Workers) -> Tensor:
    """mean g g^T, (out, out) float32, over windows of gradients (tokens, out) each."""
    found = collect(gradients, {}, workers.pool).hessian
    if not torch.isfinite(found.sum()):
        raise WorkError(
            f"the gradients at the outputs of {name} are not finite",
            "set curvature_windows to 0, and check the source with `compress eval`",
        )
    return found

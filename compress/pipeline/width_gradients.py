"""First-order importance of neurons and query heads: what the objective loses, to first order, where one is silent.

Of every token t and neuron j that is |a_tj dL/da_tj|, of a head the magnitude of the sum over its values; the sums over
tokens decide. L is the loss of the next token (taylor; LLM-Pruner, arXiv:2305.11627, ranks weights so), or the highest
logit, which needs no label (logits; after NIRVANA, arXiv:2509.14230). The model is walked backwards block by block from
the hidden states of one forward pass, so one block with its gradients is in memory at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import WorkError
from compress.pipeline import inputs, stats_cache
from compress.pipeline.block import Workers
from compress.pipeline.width_job import KEPT, WidthJob
from compress.progress import Progress
from compress.pruning import width

TOKENS = 8192
"""How many calibration tokens the gradients are taken over."""


def decide(job: WidthJob, workers: Workers, progress: Progress) -> dict[str, Any]:
    """The neurons and the query heads of every block that stay, sorted; none of an expert that no token reached.

    Raises WorkError where a gradient is not finite.
    """
    what = f"gradients-{job.method.importance}"
    found = stats_cache.measured(job, what, {}, lambda: _importance(job, workers, progress), progress)
    kept: dict[str, list[int]] = {}
    for spec in job.skeleton.linears():
        if spec.name in found:
            sections, keep, _ = job.groups(spec)
            kept[spec.name] = width.highest(found[spec.name], sections, 1, keep).tolist()
    return {KEPT: kept}


def _importance(job: WidthJob, workers: Workers, progress: Progress) -> dict[str, Tensor]:
    """Of every linear that neurons or query heads feed, by name: their importance (neurons,) or (heads,)."""
    assert job.calibration is not None
    tokens = job.calibration.tokens
    tokens = tokens[: max(1, TOKENS // tokens.shape[1])]
    blocks = job.skeleton.num_blocks
    entering = inputs.enter(job.skeleton, tokens, False)
    progress.begin("gradients of what neurons and heads put out", 2 * blocks)
    hidden = [entering.quantized]
    for block in range(blocks):
        module = job.skeleton.materialise(block)
        leaving = list(workers.pool.map(lambda run: run(), entering.runs(job.skeleton, module)))
        entering = entering.advanced(leaving)
        hidden.append(leaving)
        progress.advance(f"block {block}: forward")
    gradient = _at_the_end(job, tokens, hidden.pop())
    kept: dict[str, Tensor] = {}
    for block in reversed(range(blocks)):
        gradient, found = _through(job, block, entering.calls, hidden.pop(), gradient)
        if not all(torch.isfinite(each).all() for each in found.values()):
            raise WorkError(f"the gradients of block {block} are not finite", "check the model with `compress eval`")
        kept |= found
        progress.advance(f"block {block}: backward")
    progress.end()
    return kept


def _at_the_end(job: WidthJob, tokens: Tensor, leaving: list[Tensor]) -> list[Tensor]:
    """The gradient of the objective by what leaves the last block, chunk by chunk."""
    found, place = [], 0
    for chunk in leaving:
        parts = []
        for window in chunk.split(1):
            state = window.clone().requires_grad_()
            with torch.enable_grad():
                logits = job.skeleton.differentiable_head(state)[0]
                if job.method.importance == "taylor":
                    objective = nn.functional.cross_entropy(logits[:-1], tokens[place, 1:], reduction="sum")
                else:
                    objective = logits.amax(-1).sum()
                parts.append(torch.autograd.grad(objective, state)[0])
            place += 1
        found.append(torch.cat(parts))
    return found


def _through(
    job: WidthJob, block: int, calls: list[Any], hidden: list[Tensor], gradient: list[Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The gradient by what enters the block, and the importance of neurons and heads, as `_importance` gives it."""
    skeleton = job.skeleton
    module = skeleton.materialise(block)
    live = skeleton.modules(block, module)
    specs = {spec.name: spec for spec in skeleton.linears(block) if job.consumes(spec)}
    seen: dict[str, Tensor] = {}
    handles = [
        live[name].register_forward_pre_hook(lambda _, given, name=name: seen.__setitem__(name, given[0]))
        for name in specs
    ]
    sums: dict[str, Tensor] = {}
    below = []
    try:
        for place, (entering, above) in enumerate(zip(hidden, gradient, strict=True)):
            seen.clear()
            state = entering.clone().requires_grad_()
            with torch.enable_grad():
                leaving = skeleton.run_block(module, state, calls[place][block])
                by, *others = torch.autograd.grad(leaving, [state, *seen.values()], above)
            below.append(by)
            for (name, values), slope in zip(seen.items(), others, strict=True):
                _, _, size = job.groups(specs[name])
                shares = (values.detach() * slope).float().flatten(0, -2)
                units = shares.reshape(len(shares), -1, size).sum(2).abs().sum(0)
                sums[name] = sums[name] + units if name in sums else units
    finally:
        for handle in handles:
            handle.remove()
    return below, sums

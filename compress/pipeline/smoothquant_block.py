"""SmoothQuant: statistics on the float block, scales edge by edge, each checked; then another method rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing

from torch import Tensor, nn

from compress.artifact.manifest import Fallback
from compress.calibration.staged import StagedForward
from compress.models.skeleton import LinearSpec
from compress.pipeline.block import BlockResult, OpenBlock, Workers, open_block, stages
from compress.pipeline.fold import Fold, Probe, changed_floats, fold, free_edges
from compress.pipeline.handover import Details, Folded, recast, rounded
from compress.pipeline.inputs import Activations
from compress.pipeline.job import Job
from compress.pipeline.linears import live_weight, sample_of
from compress.quantization import smoothquant
from compress.quantization.configs import SmoothQuantConfig


def through_block(
    job: Job,
    method: SmoothQuantConfig,
    specs: Sequence[LinearSpec],
    block: int,
    entering: Activations,
    workers: Workers,
) -> BlockResult:
    """Smooths the float block behind the blocks as quantised so far, then lets the method of `rounding` have it."""
    folded = _smoothed(job, method, specs, block, entering, workers)
    return rounded(job, method.rounding, specs, block, entering, workers, folded)


def _smoothed(
    job: Job,
    method: SmoothQuantConfig,
    specs: Sequence[LinearSpec],
    block: int,
    entering: Activations,
    workers: Workers,
) -> Folded:
    """The block with its scales folded in."""
    opened = open_block(job, block)
    live = dict(opened.live)
    quantized = {spec.name for spec in specs}
    edges = [edge for edge in free_edges(job, block) if set(edge.consumers) <= quantized]
    edges = [edge for edge in edges if len({job.schemes[name] for name in edge.consumers}) == 1]
    highest, samples = _float_pass(entering, opened, {name for edge in edges for name in edge.consumers}, job, workers)
    dtypes = {name: tensor.dtype for name, tensor in opened.module.state_dict().items()}
    module = opened.module.float()  # exact: the compute dtype holds the stored weights without rounding
    probe = Probe(job, module, entering)
    scales: dict[str, Tensor] = {}
    touched: set[str] = set()
    fallbacks: list[Fallback] = []
    details: Details = {}
    for edge in edges:
        first = edge.consumers[0]
        if first not in samples:
            continue
        weights = {name: live_weight(live[name]) for name in edge.consumers}
        found = smoothquant.search_scale(
            weights, highest[first], samples[first], job.schemes[first], method, workers.pool
        )
        moved = fold(job, edge, live, found.scale, probe) if found.scale is not None else Fold(None, 0.0)
        if found.scale is not None and moved.scale is None:
            reason = f"scaling moved the float block's output by {moved.change:.1e} of its norm"
            fallbacks += [Fallback(name=name, action="identity scale", reason=reason) for name in edge.consumers]
        if moved.scale is not None:
            scales |= dict.fromkeys(edge.consumers, moved.scale)
            touched |= {name for name in (edge.producer, *edge.consumers) if name in quantized}
        for name in edge.consumers:
            details[name] = {
                "edge": edge.producer,
                "alpha": found.alpha,
                "identity": moved.scale is None,
                "loss_share": found.loss / found.identity_loss if found.identity_loss > 0 else 1.0,
                "fold_change": moved.change,
            }
    changed = changed_floats(job, live, quantized, edges)
    weights = {name: live_weight(live[name]) for name in sorted(touched)}
    recast(module, dtypes)
    return Folded(OpenBlock(module, live, weights, scales), changed, fallbacks, details)


def _float_pass(
    entering: Activations, opened: OpenBlock, names: set[str], job: Job, workers: Workers
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """The largest |x_j| (in,) and a sample (tokens, in) of the inputs of each linear, on the float block."""
    highest: dict[str, Tensor] = {}
    samples: dict[str, Tensor] = {}
    watched: dict[str, nn.Module] = {name: module for name, module in opened.live.items() if name in names}
    forward = StagedForward(entering.runs(job.skeleton, opened.module), watched, workers.count)
    with closing(stages(forward)) as reached:
        for stage in reached:
            chunks = [chunk for chunk in stage.inputs if chunk.numel()]
            if chunks:
                ranges = list(workers.pool.map(lambda chunk: chunk.abs().amax(0).float(), chunks))
                highest[stage.name] = ranges[0]
                for other in ranges[1:]:
                    highest[stage.name] = highest[stage.name].maximum(other)
                samples[stage.name] = sample_of(chunks)
    return highest, samples

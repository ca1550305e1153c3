"""AWQ: statistics on the float block, scales edge by edge, each checked; then rounding; then a second pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.artifact.manifest import Fallback
from compress.calibration.staged import StagedForward
from compress.calibration.statistics import GroupStats, collect_groups
from compress.models.skeleton import LinearSpec
from compress.pipeline.block import BlockResult, OpenBlock, Workers, open_block, stages
from compress.pipeline.fold import Fold, Probe, changed_floats, fold, free_edges
from compress.pipeline.handover import Details, Folded, recast, rounded
from compress.pipeline.inputs import Activations
from compress.pipeline.job import Job
from compress.pipeline.linears import UNSEEN, finished, in_tiles, live_weight, put, sample_of
from compress.pipeline.linears import rounded as round_unseen
from compress.pipeline.routing import Routing
from compress.quantization import awq
from compress.quantization.configs import AwqConfig
from compress.types import IntScheme


def through_block(
    job: Job,
    method: AwqConfig,
    specs: Sequence[LinearSpec],
    block: int,
    entering: Activations,
    workers: Workers,
) -> BlockResult:
    """Scales the float block, then rounds it after the clip search, or lets the method of `rounding` have it."""
    scaled = _scaled(job, method, specs, block, entering, workers)
    if method.rounding is not None:
        return rounded(job, method.rounding, specs, block, entering, workers, scaled.folded)
    return _clipped(job, method, specs, entering, workers, scaled)


@dataclass
class _Scaled:
    """The scaled block, still in float32, and what its inputs are like: statistics and a sample by linear."""

    folded: Folded
    dtypes: dict[str, torch.dtype]
    stats: dict[str, GroupStats]
    samples: dict[str, Tensor]
    routing: Routing


def _scaled(
    job: Job, method: AwqConfig, specs: Sequence[LinearSpec], block: int, entering: Activations, workers: Workers
) -> _Scaled:
    """Statistics on the float block, then scales edge by edge, each checked."""
    opened = open_block(job, block)
    live, by_name = dict(opened.live), {spec.name: spec for spec in specs}
    edges = free_edges(job, block)
    watched = {name: live[name] for name in live if name in by_name or any(name in edge.consumers for edge in edges)}
    routing = Routing.of(job.stage.calibration, opened.module)
    stats, samples = _float_pass(job, entering, opened.module, watched, routing, workers)
    dtypes = {name: tensor.dtype for name, tensor in opened.module.state_dict().items()}
    module = opened.module.float()  # exact: the compute dtype holds the stored weights without rounding
    probe = Probe(job, module, entering)
    details: Details = {name: {} for name in by_name}
    fallbacks: list[Fallback] = []
    scales: dict[str, Tensor] = {}
    touched: set[str] = set()
    for edge in edges if method.scale_search else ():
        chosen = [name for name in edge.consumers if name in by_name and name in stats]
        if not chosen:
            continue
        scaling = awq.search_scale(
            {name: live_weight(live[name]) for name in chosen},
            {name: stats[name].square_mean for name in chosen},
            max((stats[name] for name in edge.consumers if name in stats), key=lambda s: s.tokens).absmean,
            {name: job.integers(by_name[name]) for name in chosen},
            method,
            workers.pool,
            powers_of_two=any(name not in by_name for name in edge.consumers),  # so that routers stay exact
        )
        moved = fold(job, edge, live, scaling.scale, probe) if scaling.scale is not None else Fold(None, 0.0)
        if scaling.scale is not None and moved.scale is None:
            reason = f"scaling moved the float block's output by {moved.change:.1e} of its norm"
            fallbacks += [Fallback(name=name, action="identity scale", reason=reason) for name in chosen]
        if moved.scale is not None:
            scales |= dict.fromkeys(edge.consumers, moved.scale)
            touched |= {name for name in (edge.producer, *edge.consumers) if name in by_name}
            for name in edge.consumers:
                if name in stats:
                    stats[name] = _rescaled(stats[name], moved.scale)
                    samples[name] = samples[name] / moved.scale
        for name in chosen:
            details[name] |= {
                "edge": edge.producer,
                "exponent": scaling.exponent,
                "duo": scaling.duo,
                "identity": moved.scale is None,
                "loss_share": scaling.loss / scaling.identity_loss if scaling.identity_loss > 0 else 1.0,
                "fold_change": moved.change,
            }
    changed = changed_floats(job, live, set(by_name), edges)
    weights = {name: live_weight(live[name]) for name in sorted(touched)}
    folded = Folded(OpenBlock(module, live, weights, scales), changed, fallbacks, details)
    if method.rounding is not None:
        recast(module, dtypes)
    return _Scaled(folded, dtypes, stats, samples, routing)


def _clipped(
    job: Job,
    method: AwqConfig,
    specs: Sequence[LinearSpec],
    entering: Activations,
    workers: Workers,
    scaled: _Scaled,
) -> BlockResult:
    """Rounds every linear on its own after the clip search; then a second pass."""
    folded, stats = scaled.folded, scaled.stats
    result = BlockResult(changed=folded.changed, fallbacks=folded.fallbacks)
    module, live = folded.opened.module, folded.opened.live
    for spec in specs:
        name = spec.name
        weight, dtype, scheme = live_weight(live[name]), job.scale_dtype(spec), job.integers(spec)
        if name not in stats:
            linear = round_unseen(job, spec, weight, UNSEEN, workers.pool)
        else:
            importance = stats[name].blocks if method.clip else None
            quantized = in_tiles(weight, lambda rows: awq.round_clipped(rows, importance, scheme, dtype), workers.pool)  # noqa: B023
            linear = finished(job, spec, quantized, weight, scaled.samples[name], details=dict(folded.details[name]))
        put(live[name], linear.quantized)
        result.linears.append(scaled.routing.noted(linear))
    recast(module, scaled.dtypes)
    outputs = list(workers.pool.map(_without_gradients, entering.runs(job.skeleton, module)))
    result.activations = entering.advanced(outputs)
    return result


def _float_pass(
    job: Job,
    entering: Activations,
    module: nn.Module,
    watched: dict[str, nn.Module],
    routing: Routing,
    workers: Workers,
) -> tuple[dict[str, GroupStats], dict[str, Tensor]]:
    """Statistics and a sample of the inputs of every watched module, on the float block behind quantised ones."""
    stats: dict[str, GroupStats] = {}
    samples: dict[str, Tensor] = {}
    forward = StagedForward(entering.runs(job.skeleton, module), {**routing.watched, **watched}, workers.count)
    previous = None
    with closing(stages(forward, routing)) as reached:
        for stage in reached:
            if stage.same_input and previous is not None:
                stats[stage.name], samples[stage.name] = stats[previous], samples[previous]
            elif sum(chunk.shape[0] for chunk in stage.inputs):
                scheme = job.schemes.get(stage.name, job.distinct_schemes[0])
                assert isinstance(scheme, IntScheme)
                width = stage.inputs[0].shape[-1]
                groups = scheme.groups(width) if scheme.fits(width) else 1
                stats[stage.name] = collect_groups(stage.inputs, groups, workers.pool)
                samples[stage.name] = sample_of(stage.inputs)
            previous = stage.name if stage.name in stats else None
    routing.close()
    return stats, samples


def _rescaled(stats: GroupStats, scale: Tensor) -> GroupStats:
    """Statistics of x / scale."""
    groups, size, _ = stats.blocks.shape
    inverse = (1 / scale).reshape(groups, size)
    blocks = stats.blocks * inverse.unsqueeze(1) * inverse.unsqueeze(2)
    return GroupStats(blocks, stats.absmean / scale, stats.tokens)


def _without_gradients(run: object) -> Tensor:
    with torch.inference_mode():
        return run()  # type: ignore[operator]

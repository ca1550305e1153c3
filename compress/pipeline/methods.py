"""Each method's way through one decoder block: what it looks at, what it changes, and what flows on.

Every function returns the finished linears, the float tensors it changed on the way, and the activations entering the
next block.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers.pytorch_utils import Conv1D

from compress.artifact.manifest import Fallback
from compress.calibration.staged import Stage, StagedForward
from compress.calibration.statistics import GroupStats, collect, collect_groups
from compress.models.families import Edge
from compress.models.folding import fold_scale
from compress.models.skeleton import LinearSpec
from compress.pipeline.inputs import Activations
from compress.pipeline.job import Job
from compress.pipeline.linears import QuantizedLinear, in_tiles, join, record, sample_of
from compress.pipeline.source import read_finite, read_weight
from compress.quantization import awq, gptq, rtn
from compress.quantization.configs import AwqConfig, GptqConfig, RtnConfig
from compress.quantization.grid import quantize, search_grid
from compress.types import IntScheme, QuantizedTensor

# A fold is undone when the float block's output moves by more than this share of its norm.
FOLD_TOLERANCE = 1e-4

UNSEEN = "no calibration token reached it"
ROWS_PER_GPTQ_TILE = 128


@dataclass
class BlockResult:
    """linears: the quantised ones. changed: other float tensors that differ from the source, by checkpoint name."""

    linears: list[QuantizedLinear] = field(default_factory=list)
    changed: dict[str, Tensor] = field(default_factory=dict)
    fallbacks: list[Fallback] = field(default_factory=list)
    activations: Activations | None = None


def through_block(job: Job, block: int, activations: Activations | None, pool: Executor, workers: int) -> BlockResult:
    """Takes block number `block` through the job's method; `activations` enter it (None for data-free methods)."""
    specs = [spec for spec in job.skeleton.linears(block) if spec.name in job.schemes]
    method = job.stage.method
    if isinstance(method, RtnConfig):
        return _rtn(job, method, specs, pool)
    assert activations is not None
    list(pool.map(lambda name: read_finite(job.checkpoint, name), job.skeleton.block_tensors(block)))
    if isinstance(method, GptqConfig):
        return _gptq(job, method, specs, block, activations, pool, workers)
    return _awq(job, method, specs, block, activations, pool, workers)


def _rtn(job: Job, method: RtnConfig, specs: Sequence[LinearSpec], pool: Executor) -> BlockResult:
    result = BlockResult()
    for spec in specs:
        weight, dtype, scheme = read_weight(job.checkpoint, spec), job.scale_dtype(spec), job.schemes[spec.name]
        quantized = in_tiles(weight, lambda rows: rtn.transform(rows, scheme, method, dtype), pool)  # noqa: B023
        result.linears.append(_finished(job, spec, quantized, weight))
    return result


def _gptq(
    job: Job,
    method: GptqConfig,
    specs: Sequence[LinearSpec],
    block: int,
    entering: Activations,
    pool: Executor,
    workers: int,
) -> BlockResult:
    """One pass through the block, pausing at each linear; the original block runs beside it where errors are undone."""
    skeleton, result = job.skeleton, BlockResult()
    module = skeleton.materialise(block)
    live = skeleton.modules(block, module)
    by_name = {spec.name: spec for spec in specs}
    forward = StagedForward(
        entering.runs(skeleton, module, entering.quantized), {name: live[name] for name in by_name}, workers
    )
    twin: StagedForward | None = None
    if entering.original is not None:
        original = skeleton.materialise(block)
        beside = skeleton.modules(block, original)
        # Tokens of an expert differ between the two models, so experts have no counterpart to compare with.
        watched = {name: beside[name] for name, spec in by_name.items() if spec.expert is None}
        twin = StagedForward(entering.runs(skeleton, original, entering.original), watched, workers)
    shared: gptq.Preconditioner | None = None
    with closing(_stages(forward)) as stages, closing(_stages(twin)) as counterparts:
        for stage in stages:
            spec = by_name.pop(stage.name)
            originals = None
            if twin is not None and spec.expert is None:
                counterpart = next(counterparts)
                assert counterpart.name == stage.name, "the two models must meet their linears in one order"
                originals = counterpart.inputs
            if shared is None or not stage.same_input:
                shared = gptq.Preconditioner(collect(stage.inputs, originals, pool), method)
            linear = _gptq_linear(job, method, spec, shared, stage.inputs, originals, pool)
            _put(live[spec.name], linear.quantized)
            result.linears.append(linear)
        for _ in counterparts:  # lets the original block run to its end
            pass
    for spec in by_name.values():  # experts that no token of the calibration text reached
        result.linears.append(_rounded(job, spec, read_weight(job.checkpoint, spec), UNSEEN, pool))
    outputs = twin.outputs if twin is not None else None
    result.activations = entering.advanced(forward.outputs, outputs)
    return result


def _stages(forward: StagedForward | None) -> Generator[Stage, None, None]:
    """Its stages; none of no forward."""
    if forward is not None:
        yield from forward


def _gptq_linear(
    job: Job,
    method: GptqConfig,
    spec: LinearSpec,
    shared: gptq.Preconditioner,
    inputs: list[Tensor],
    originals: list[Tensor] | None,
    pool: Executor,
) -> QuantizedLinear:
    weight, dtype, scheme = read_weight(job.checkpoint, spec), job.scale_dtype(spec), job.schemes[spec.name]
    if shared.factored is None:
        return _rounded(job, spec, weight, "no damping makes its Hessian positive definite", pool)
    shared.inverse_blocks(scheme.groups(spec.in_features))  # computed once, before the tiles need it
    tiles = list(
        pool.map(lambda rows: gptq.transform(rows, shared, scheme, method, dtype), weight.split(ROWS_PER_GPTQ_TILE))
    )
    raised = shared.factored.damp_frac > method.damp_frac
    reason = f"the Hessian needed damping {shared.factored.damp_frac:g}" if raised else None
    reference = None if originals is None else sample_of(originals)
    return _finished(
        job, spec, join(tiles), weight, sample_of(inputs), reference,
        fallback=("damping raised", reason) if reason else None,
        details={"damp_frac": shared.factored.damp_frac, "tokens": shared.stats.tokens},
    )  # fmt: skip


def _awq(
    job: Job,
    method: AwqConfig,
    specs: Sequence[LinearSpec],
    block: int,
    entering: Activations,
    pool: Executor,
    workers: int,
) -> BlockResult:
    """Statistics on the float block, then scales edge by edge, each checked; then rounding; then a second pass."""
    skeleton, result = job.skeleton, BlockResult()
    module = skeleton.materialise(block)
    live = skeleton.modules(block, module)
    by_name = {spec.name: spec for spec in specs}
    edges = skeleton.edges(block)
    watched = {name: live[name] for name in live if name in by_name or any(name in edge.consumers for edge in edges)}
    stats, samples = _float_pass(job, entering, module, watched, pool, workers)
    module = module.float()  # exact: the compute dtype holds the stored weights without rounding
    probe = _Probe(job, module, entering)
    details: dict[str, dict[str, float | str | bool]] = {name: {} for name in by_name}
    for edge in edges if method.scale_search else ():
        chosen = [name for name in edge.consumers if name in by_name and name in stats]
        if not chosen:
            continue
        scaling = awq.search_scale(
            {name: _weight(live[name]) for name in chosen},
            {name: stats[name].square_mean for name in chosen},
            max((stats[name] for name in edge.consumers if name in stats), key=lambda s: s.tokens).absmean,
            job.schemes[chosen[0]],
            method,
            pool,
        )
        moved = _fold(job, edge, live, scaling.scale, probe) if scaling.scale is not None else _Fold(None, 0.0)
        if scaling.scale is not None and moved.scale is None:
            reason = f"scaling moved the float block's output by {moved.change:.1e} of its norm"
            result.fallbacks += [Fallback(name=name, action="identity scale", reason=reason) for name in chosen]
        if moved.scale is not None:
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
    result.changed = _changed_floats(job, block, live, set(by_name), edges)
    for name, spec in by_name.items():
        weight, dtype, scheme = _weight(live[name]), job.scale_dtype(spec), job.schemes[name]
        if name not in stats:
            linear = _rounded(job, spec, weight, UNSEEN, pool)
        else:
            importance = stats[name].blocks if method.clip else None
            quantized = in_tiles(weight, lambda rows: awq.round_clipped(rows, importance, scheme, dtype), pool)  # noqa: B023
            linear = _finished(job, spec, quantized, weight, samples[name], details=dict(details[name]))
        _put(live[name], linear.quantized)
        result.linears.append(linear)
    module = module.to(skeleton.dtype)
    outputs = list(pool.map(_without_gradients, entering.runs(skeleton, module, entering.quantized)))
    result.activations = entering.advanced(outputs, None)
    return result


def _float_pass(
    job: Job,
    entering: Activations,
    module: nn.Module,
    watched: dict[str, nn.Module],
    pool: Executor,
    workers: int,
) -> tuple[dict[str, GroupStats], dict[str, Tensor]]:
    """Statistics and a sample of the inputs of every watched module, on the float block behind quantised ones."""
    stats: dict[str, GroupStats] = {}
    samples: dict[str, Tensor] = {}
    forward = StagedForward(entering.runs(job.skeleton, module, entering.quantized), watched, workers)
    previous = None
    with closing(_stages(forward)) as stages:
        for stage in stages:
            if stage.same_input and previous is not None:
                stats[stage.name], samples[stage.name] = stats[previous], samples[previous]
            elif sum(chunk.shape[0] for chunk in stage.inputs):
                scheme = job.schemes.get(stage.name, job.scheme)
                width = stage.inputs[0].shape[-1]
                groups = scheme.groups(width) if scheme.fits(width) else 1
                stats[stage.name] = collect_groups(stage.inputs, groups, pool)
                samples[stage.name] = sample_of(stage.inputs)
            previous = stage.name if stage.name in stats else None
    return stats, samples


@dataclass(frozen=True, slots=True)
class _Fold:
    """What became of a fold: the scale in effect (None: undone or not tried), how far the float output moved."""

    scale: Tensor | None
    change: float


class _Probe:
    """One calibration window through the float block, to see that a fold changes nothing."""

    def __init__(self, job: Job, module: nn.Module, entering: Activations) -> None:
        self._job, self._module = job, module
        self._hidden = entering.quantized[0][:1].float()
        call = entering.single[entering.block]
        self._call = tree_map_only(torch.Tensor, lambda t: t.float() if t.is_floating_point() else t, call)
        self._expected = self.output()

    def output(self) -> Tensor:
        with torch.inference_mode():
            return self._job.skeleton.run_block(self._module, self._hidden, self._call)

    def change(self) -> float:
        """Norm of the output's change since the start, as a share of its norm."""
        return float((self.output() - self._expected).norm() / self._expected.norm())


def _fold(job: Job, edge: Edge, live: dict[str, nn.Module], wanted: Tensor, probe: _Probe) -> _Fold:
    """Folds the nearest scale that the producer's stored dtype can express; undoes it if the block's output moves."""
    names = (edge.producer, *edge.consumers)
    before = {name: {key: value.clone() for key, value in live[name].state_dict().items()} for name in names}
    scale = _expressible(job, edge, live[edge.producer], wanted) if edge.kind == "norm" else wanted
    fold_scale(edge, live, scale)
    tolerance = FOLD_TOLERANCE
    if edge.kind == "norm":
        dtype = job.checkpoint.index[f"{edge.producer}.weight"].dtype
        for parameter in live[edge.producer].parameters(recurse=False):
            parameter.data = parameter.data.to(dtype).float()
        if edge.has_bias:  # the bias is rounded to its stored dtype on its own
            tolerance += 4 * torch.finfo(dtype).eps
    change = probe.change()
    if change <= tolerance:
        return _Fold(scale, change)
    for name, state in before.items():
        live[name].load_state_dict(state)
    return _Fold(None, change)


def _expressible(job: Job, edge: Edge, norm: nn.Module, wanted: Tensor) -> Tensor:
    """The scale that dividing the norm's weight has after that weight is rounded to its stored dtype."""
    dtype = job.checkpoint.index[f"{edge.producer}.weight"].dtype
    offset = 1.0 if edge.offset else 0.0
    gain = cast(Tensor, norm.weight).data + offset
    stored = (gain / wanted - offset).to(dtype).float() + offset
    scale = gain / stored
    return torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0)


def _rescaled(stats: GroupStats, scale: Tensor) -> GroupStats:
    """Statistics of x / scale."""
    groups, size, _ = stats.blocks.shape
    inverse = (1 / scale).reshape(groups, size)
    blocks = stats.blocks * inverse.unsqueeze(1) * inverse.unsqueeze(2)
    return GroupStats(blocks, stats.absmean / scale, stats.tokens)


def _changed_floats(
    job: Job, block: int, live: dict[str, nn.Module], quantized: set[str], edges: Sequence[Edge]
) -> dict[str, Tensor]:
    """Float tensors that folding touched and that are stored as floats: norms, biases, routers, ignored linears."""
    changed = {}
    for name in sorted({name for edge in edges for name in (edge.producer, *edge.consumers)}):
        for key, value in live[name].state_dict().items():
            tensor = f"{name}.{key}"
            if tensor not in job.checkpoint.index or (name in quantized and key == "weight"):
                continue
            source = job.checkpoint.read(tensor)
            now = value.to(source.dtype)
            if not torch.equal(now, source):
                changed[tensor] = now.contiguous()
    return changed


def _rounded(job: Job, spec: LinearSpec, weight: Tensor, reason: str, pool: Executor) -> QuantizedLinear:
    """A linear without usable statistics: round to nearest with searched scales, recorded as a fallback."""
    scheme, dtype = job.schemes[spec.name], job.scale_dtype(spec)
    quantized = in_tiles(weight, lambda rows: quantize(rows, search_grid(rows, scheme, dtype)), pool)
    return _finished(job, spec, quantized, weight, fallback=("rtn", reason))


def _finished(
    job: Job,
    spec: LinearSpec,
    quantized: QuantizedTensor,
    weight: Tensor,
    sample: Tensor | None = None,
    reference: Tensor | None = None,
    fallback: tuple[str, str] | None = None,
    details: dict[str, float | int | str | bool | None] | None = None,
) -> QuantizedLinear:
    scheme: IntScheme = job.schemes[spec.name]
    layer = record(
        spec, job.method_name, weight, quantized.dequantize().float(), scheme, quantized.scale.element_size() * 8,
        sample, reference, fallback[0] if fallback else None, details,
    )  # fmt: skip
    found = (Fallback(name=spec.name, action=fallback[0], reason=fallback[1]),) if fallback else ()
    return QuantizedLinear(spec, quantized, layer, found)


def _weight(module: nn.Module) -> Tensor:
    """The live weight as (out, in)."""
    weight = cast(Tensor, module.weight).data
    return weight.T.contiguous() if isinstance(module, Conv1D) else weight


def _put(module: nn.Module, quantized: QuantizedTensor) -> None:
    """Gives a live linear the weight that its quantised form stands for."""
    parameter = cast(nn.Parameter, module.weight)
    dense = quantized.dequantize().to(parameter.dtype)
    parameter.data = dense.T.contiguous() if isinstance(module, Conv1D) else dense


def _without_gradients(run: object) -> Tensor:
    with torch.inference_mode():
        return run()  # type: ignore[operator]

"""Zeros in one block: one pass, pausing at each linear, so that each is judged behind pruned predecessors.

Methods that update nothing may ask for what the linears get before any of the block is pruned, as the papers' code and
llm-compressor take it; then a second pass runs the pruned block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing

from torch import Tensor

from compress.calibration.staged import StagedForward
from compress.calibration.statistics import LinearStats, collect, square_mean
from compress.models.skeleton import LinearSpec
from compress.pipeline import mask_moments
from compress.pipeline.block import Workers
from compress.pipeline.inputs import Activations
from compress.pipeline.linears import UNSEEN, put_dense
from compress.pipeline.masked import PrunedLinear, finished
from compress.pipeline.prune_job import PruneJob
from compress.pipeline.source import read_weight
from compress.pipeline.twin import Pair, pairs, twin_of
from compress.pruning import magnitude, ria, sparsegpt, wanda
from compress.pruning.configs import RiaConfig, SparseGptConfig, WandaConfig
from compress.pruning.masks import zero_mask
from compress.quantization.gptq import Preconditioner
from compress.types import Sparsity

Scored = WandaConfig | RiaConfig | SparseGptConfig
Details = dict[str, float | int | str | bool | None]


def by_magnitude(job: PruneJob, specs: Sequence[LinearSpec]) -> list[PrunedLinear]:
    """Every linear of the block, data-free."""
    return [_by_magnitude(job, spec, None) for spec in specs]


def through_block(
    job: PruneJob, method: Scored, specs: Sequence[LinearSpec], block: int, entering: Activations, workers: Workers
) -> tuple[list[PrunedLinear], Activations]:
    """The pruned linears and what leaves the block; the original block runs beside it where errors are undone."""
    skeleton, pool = job.skeleton, workers.pool
    module = skeleton.materialise(block)
    live = skeleton.modules(block, module)
    by_name = {spec.name: spec for spec in specs}
    forward = StagedForward(entering.runs(skeleton, module), {name: live[name] for name in by_name}, workers.count)
    twin = twin_of(job, entering, specs, block, workers)
    at_once = not isinstance(method, SparseGptConfig) and method.norms == "block"
    linears: list[PrunedLinear] = []
    pruner: _Pruner | None = None
    with closing(pairs(forward, twin, entering, specs)) as reached:
        for pair in reached:
            stage, spec = pair.stage, by_name.pop(pair.stage.name)
            if pruner is None or not stage.same_input:
                pruner = _Pruner(method, job.sparsity_of(spec), _statistics(method, pair, pool), pool)
            weight = read_weight(job.checkpoint, spec)
            sample, reference = pair.samples()
            pruned = pruner.pruned(weight, zero_mask(weight, spec.name in job.sparse))
            details: Details = {"tokens": sum(chunk.shape[0] for chunk in stage.inputs), **pruner.details}
            linear = finished(job, spec, weight, pruned, sample, reference, pruner.fallback, details)
            if not at_once:
                put_dense(live[spec.name], linear.weight)
            linears.append(linear)
    linears += [_by_magnitude(job, spec, UNSEEN) for spec in by_name.values()]
    leaving = forward.outputs
    if at_once:
        for linear in linears:
            put_dense(live[linear.spec.name], linear.weight)
        leaving = list(pool.map(lambda run: run(), entering.runs(skeleton, module)))
    return linears, entering.advanced(leaving, [] if twin is None else twin.outputs)


def by_moments(
    job: PruneJob, method: Scored, specs: Sequence[LinearSpec], found: Mapping[str, Tensor], workers: Workers
) -> list[PrunedLinear]:
    """Every linear of the block, by what it reads in the model before any of it is pruned: `mask_moments` as kept."""
    linears = []
    reading, unseen = mask_moments.by_input(found, specs)
    for stats, members in reading:
        pruner = _Pruner(method, job.sparsity_of(members[0]), stats, workers.pool)
        details: Details = {"tokens": stats.tokens, **pruner.details}
        for spec in members:
            weight = read_weight(job.checkpoint, spec)
            pruned = pruner.pruned(weight, zero_mask(weight, spec.name in job.sparse))
            linears.append(finished(job, spec, weight, pruned, fallback=pruner.fallback, details=details))
    return linears + [_by_magnitude(job, spec, UNSEEN) for spec in unseen]


def _statistics(method: Scored, pair: Pair, pool: Executor) -> Tensor | LinearStats:
    chunks = pair.stage.inputs
    return collect(chunks, pair.originals, pool) if isinstance(method, SparseGptConfig) else square_mean(chunks, pool)


class _Pruner:
    """The method with what it knows of one input, for all the linears that share it."""

    def __init__(self, method: Scored, sparsity: Sparsity, stats: Tensor | LinearStats, pool: Executor) -> None:
        """stats: mean x^2 (in,) is enough for methods that update nothing."""
        self._method, self._sparsity, self._pool = method, sparsity, pool
        self.fallback: tuple[str, str] | None = None
        self.details: Details = {}
        self._shared: Preconditioner | None = None
        self._squares = stats if isinstance(stats, Tensor) else stats.hessian.diagonal()
        if not isinstance(method, SparseGptConfig):
            return
        assert isinstance(stats, LinearStats)
        if sparsity.of is not None:  # a pattern's columns stay neighbours
            method = method.model_copy(update={"act_order": False})
        shared = Preconditioner(stats, method, pool)
        if shared.factored is None:
            self.fallback = ("wanda", "no damping makes its Hessian positive definite")
            return
        self._shared = shared
        if (damp_frac := shared.factored.damp_frac) > method.damp_frac:
            self.fallback = ("damping raised", f"the Hessian needed damping {damp_frac:g}")
        self.details |= {"damp_frac": damp_frac, "corrected": shared.correction is not None}

    def pruned(self, weight: Tensor, gone: Tensor | None) -> Tensor:
        """The weight (out, in) float32 with its zeros; gone: (out, in) bool, those of an earlier pruning."""
        if isinstance(self._method, RiaConfig):
            return weight.masked_fill(ria.mask(weight, self._squares, self._sparsity, self._method), 0.0)
        if isinstance(self._method, SparseGptConfig) and self._shared is not None:
            return self._updated(self._method, self._shared, weight, gone)
        config = self._method if isinstance(self._method, WandaConfig) else WandaConfig()
        return weight.masked_fill(wanda.mask(weight, self._squares, self._sparsity, config), 0.0)

    def _updated(self, method: SparseGptConfig, shared: Preconditioner, weight: Tensor, gone: Tensor | None) -> Tensor:
        assert shared.factored is not None
        if shared.correction is not None:
            if weight.shape[0] >= weight.shape[1]:
                shared.correction.expand(self._pool)
            weight = shared.correction.corrected(weight)
        pruned = sparsegpt.prune(weight, shared.factored.upper, shared.order, self._sparsity, self._pool, gone)
        return sparsegpt.refit(weight, pruned, shared.hessian, method.refit_steps, self._pool)


def _by_magnitude(job: PruneJob, spec: LinearSpec, why: str | None) -> PrunedLinear:
    weight = read_weight(job.checkpoint, spec)
    pruned = weight.masked_fill(magnitude.mask(weight, job.sparsity_of(spec)), 0.0)
    return finished(job, spec, weight, pruned, fallback=None if why is None else ("magnitude", why))

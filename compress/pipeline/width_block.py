"""One block cut in width: heads at o_proj, neurons at down_proj, each repaired for what it has lost.

The live block keeps its width, with zero columns where inputs went: it computes what the narrow one will, so one pass
serves choosing, repairing and going on. What stays is chosen by what the original model feeds the linear, so that a
cut is the same with and without repair.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.artifact.layers import LayerRecord
from compress.calibration.staged import StagedForward
from compress.calibration.statistics import LinearStats, collect
from compress.errors import WorkError
from compress.models.skeleton import LinearSpec
from compress.pipeline.block import Workers
from compress.pipeline.inputs import Activations
from compress.pipeline.linears import errors, put_dense
from compress.pipeline.source import read_finite, read_weight
from compress.pipeline.twin import pairs, twin_of
from compress.pipeline.width_job import FED_BY_HEADS, FED_BY_NEURONS, HEADS, NEURONS, WidthJob
from compress.pruning import width
from compress.quantization.gptq import Preconditioner
from compress.quantization.hessian import cholesky, damped


@dataclass
class NarrowBlock:
    """tensors: what changed, by checkpoint name. repaired: names of weights that have new values besides."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    repaired: set[str] = field(default_factory=set)
    layers: list[LayerRecord] = field(default_factory=list)
    activations: Activations | None = None


def through_block(job: WidthJob, block: int, entering: Activations, workers: Workers) -> NarrowBlock:
    """Cuts one block; `entering` must hold the original model's activations too."""
    skeleton, result = job.skeleton, NarrowBlock()
    module = skeleton.materialise(block)
    live = skeleton.modules(block, module)
    specs = {spec.name: spec for spec in skeleton.linears(block)}
    consumers = [spec for spec in specs.values() if spec.name.endswith((FED_BY_HEADS, FED_BY_NEURONS))]
    forward = StagedForward(entering.runs(skeleton, module), {s.name: live[s.name] for s in consumers}, workers.count)
    twin = twin_of(job, entering, consumers, block, workers)
    assert twin is not None
    with closing(pairs(forward, twin, entering, consumers)) as reached:
        for pair in reached:
            stage, spec = pair.stage, specs[pair.stage.name]
            wanted = collect(list(pair.originals.values()), {}, workers.pool)
            weight = read_weight(job.checkpoint, spec)
            kept = _chosen(job, spec, weight, wanted)
            narrow = _narrowed(job, spec, weight, kept, stage.inputs, pair.originals, workers)
            narrow = narrow.to(job.checkpoint.index[spec.weight].dtype)
            whole = torch.zeros_like(weight)
            whole[:, kept] = narrow.float()
            put_dense(live[spec.name], whole)
            sample, reference = pair.samples()
            lost = spec.out_features * (spec.in_features - len(kept))
            found = errors(weight, whole, sample, reference)
            result.layers.append(_report(job, spec, (spec.out_features, len(kept)), lost, *found))
            if job.method.repair:
                result.repaired.add(spec.weight)
            elif len(kept) == spec.in_features:
                continue  # nothing to do here: as it was
            result.tensors[spec.weight] = narrow
            if len(kept) == spec.in_features:
                continue
            feeding = NEURONS if spec.name.endswith(FED_BY_NEURONS) else (HEADS,)
            for producer in (each for each in specs.values() if each.name.endswith(feeding)):
                _keep_rows(job, result, producer, kept)
    result.activations = entering.advanced(forward.outputs, twin.outputs)
    return result


def _chosen(job: WidthJob, spec: LinearSpec, weight: Tensor, wanted: LinearStats) -> Tensor:
    """The inputs that stay, (kept,) int64 sorted."""
    factored = cholesky(wanted.hessian, job.method.damp_frac)
    if factored is None:
        raise _unusable(spec)
    hessian, cut = damped(wanted.hessian, factored.damp_frac), job.cut
    if spec.name.endswith(FED_BY_NEURONS):
        return width.survivors(weight, hessian, 1, 1, cut.neurons)
    heads = width.survivors(weight, hessian, cut.kv_heads, cut.head_dim, cut.heads)
    return (heads.unsqueeze(1) * cut.head_dim + torch.arange(cut.head_dim)).reshape(-1)


def _narrowed(
    job: WidthJob,
    spec: LinearSpec,
    weight: Tensor,
    kept: Tensor,
    inputs: list[Tensor],
    originals: dict[int, Tensor],
    workers: Workers,
) -> Tensor:
    """The weight (out, kept) float32."""
    if not job.method.repair:
        return weight[:, kept].contiguous()
    shared = Preconditioner(collect(inputs, originals, workers.pool), job.method, workers.pool)
    if shared.factored is None:
        raise _unusable(spec)
    if shared.correction is not None:
        shared.correction.expand(workers.pool)
        weight = shared.correction.corrected(weight)
    return width.repaired(weight, shared.hessian, kept)


def _unusable(spec: LinearSpec) -> WorkError:
    return WorkError(
        f"no damping makes the second moments of {spec.name}'s inputs positive definite",
        "calibrate on more text, or check the source model with `compress eval`",
    )


def _keep_rows(job: WidthJob, result: NarrowBlock, spec: LinearSpec, kept: Tensor) -> None:
    """The rows of a linear, and of its bias, that feed what stays."""
    for name in (spec.weight, f"{spec.name}.bias"):
        if name in job.checkpoint.index:
            result.tensors[name] = read_finite(job.checkpoint, name)[kept].contiguous()
    lost = (spec.out_features - len(kept)) * (spec.in_features + (f"{spec.name}.bias" in job.checkpoint.index))
    result.layers.append(_report(job, spec, (len(kept), spec.in_features), lost))


def _report(
    job: WidthJob,
    spec: LinearSpec,
    shape: tuple[int, int],
    removed: int,
    output_error: float | None = None,
    sqnr: float | None = None,
) -> LayerRecord:
    """shape: (out, in) as it is now. removed: parameters that went, the bias's counted."""
    return LayerRecord(
        name=spec.name,
        block=spec.block,
        method=job.method_name,
        scheme=job.label,
        bits_per_weight=8.0 * job.checkpoint.index[spec.weight].dtype.itemsize,
        output_error=output_error,
        weight_sqnr_db=sqnr,
        details={"shape": list(shape), "source_shape": [spec.out_features, spec.in_features], "removed": removed},
    )

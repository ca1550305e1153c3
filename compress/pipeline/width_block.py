"""One block cut in width: heads and neurons at the linears that they feed, the consumers, whose outputs are the stream,
and channels wherever the stream is read.

Each linear that lost inputs is repaired for it.

The live block keeps its width, with zero columns where inputs went: it computes what the narrow one will, so one pass
serves choosing, repairing and going on. What stays is chosen by what the original model feeds the linear, so that a
cut is the same with and without repair.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import cast

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from compress.artifact.layers import LayerRecord
from compress.calibration.staged import StagedForward
from compress.calibration.statistics import LinearStats, collect
from compress.errors import WorkError
from compress.models.skeleton import LinearSpec
from compress.pipeline import width_norms
from compress.pipeline.block import Workers
from compress.pipeline.inputs import Activations
from compress.pipeline.linears import errors, put_dense
from compress.pipeline.source import read_finite, read_weight
from compress.pipeline.twin import Pair, pairs, twin_of
from compress.pipeline.width_job import HEADS_KEPT, NEURONS_KEPT, WidthJob
from compress.pruning import sparsegpt, width
from compress.pruning.masks import zero_mask
from compress.quantization.gptq import Preconditioner
from compress.quantization.hessian import cholesky, damped

REFIT_STEPS = 100


@dataclass
class NarrowBlock:
    """tensors: what changed, by checkpoint name. repaired: names of weights that have new values besides."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    repaired: set[str] = field(default_factory=set)
    layers: list[LayerRecord] = field(default_factory=list)
    activations: Activations | None = None


def through_block(job: WidthJob, block: int, entering: Activations, workers: Workers) -> NarrowBlock:
    """Cuts one block; `entering` must hold the original model's activations too."""
    skeleton, result, channels = job.skeleton, NarrowBlock(), job.channels
    module = skeleton.materialise(block)
    live = skeleton.modules(block, module)
    specs = {spec.name: spec for spec in skeleton.linears(block)}
    watched = [spec for spec in specs.values() if channels is not None or _consumes(job, spec)]
    if channels is not None:
        result.tensors |= width_norms.narrow_norms(job, skeleton.block_tensors(block), live)
    forward = StagedForward(entering.runs(skeleton, module), {s.name: live[s.name] for s in watched}, workers.count)
    twin = twin_of(job, entering, watched, block, workers)
    assert twin is not None
    found: dict[str, tuple[float | None, float | None]] = {}
    shared: _Shared | None = None
    with closing(pairs(forward, twin, entering, watched)) as reached:
        for pair in reached:
            spec = specs[pair.stage.name]
            if shared is None or not pair.stage.same_input:
                shared = _Shared(job, spec, pair, workers)
            kept, weight = shared.kept, read_weight(job.checkpoint, spec)
            rows = _written(job, spec)
            narrow = shared.narrowed(weight)[rows].to(job.checkpoint.index[spec.weight].dtype)
            whole = torch.zeros_like(weight)
            whole[rows[:, None], kept] = narrow.float()
            put_dense(live[spec.name], whole)
            _keep_bias(job, result, spec, rows, live[spec.name])
            sample, reference = pair.samples()
            found[spec.name] = errors(weight[rows], whole[rows], sample, reference)
            if job.method.repair:
                result.repaired.add(spec.weight)
                _mend_behind(job, result, spec, weight, whole, sample, reference, live)
            elif narrow.shape == weight.shape:
                continue  # nothing to do here: as it was
            result.tensors[spec.weight] = narrow.T.contiguous() if spec.layout == "conv1d" else narrow
            if len(kept) == spec.in_features or not _consumes(job, spec):
                continue
            for producer in specs.values():
                if (fed := job.layout.feeds(producer.weight)) is not None and spec.name.endswith(fed):
                    _keep_rows(job, result, producer, kept)
    changed = [spec for spec in specs.values() if spec.name in found or spec.weight in result.tensors]
    result.layers += [_report(job, spec, result, *found.get(spec.name, (None, None))) for spec in changed]
    result.activations = entering.advanced(forward.outputs, twin.outputs)
    return result


class _Shared:
    """What stays of one input, and the repair of the linears that read it. kept: (kept,) int64 sorted."""

    def __init__(self, job: WidthJob, spec: LinearSpec, pair: Pair, workers: Workers) -> None:
        self._job, self._spec, self._pool = job, spec, workers.pool
        self._preconditioner: Preconditioner | None = None
        self.kept = self._chosen(pair)
        if not job.method.repair:
            return
        stats = collect(pair.stage.inputs, pair.originals, workers.pool)
        self._preconditioner = Preconditioner(stats, job.method, workers.pool)
        if self._preconditioner.factored is None:
            raise _unusable(spec)

    def _chosen(self, pair: Pair) -> Tensor:
        job, spec = self._job, self._spec
        if not _consumes(job, spec):
            assert job.channels is not None
            return job.channels
        wanted = collect(list(pair.originals.values()), {}, self._pool)
        weight = read_weight(job.checkpoint, spec)[_written(job, spec)]
        return _chosen(job, spec, weight, wanted)

    def narrowed(self, weight: Tensor) -> Tensor:
        """The weight (out, kept) float32, from (out, in)."""
        shared = self._preconditioner
        if shared is None:
            return weight[:, self.kept].contiguous()
        wanted = weight
        if shared.correction is not None:
            shared.correction.expand(self._pool)
            wanted = shared.correction.corrected(weight)
        found = width.repaired(wanted, shared.hessian, self.kept)
        zeros = zero_mask(weight)
        if zeros is None:
            return found
        # Zeros of an earlier pruning stay: the least-squares values of the others make up for them.
        start = weight[:, self.kept]
        return sparsegpt.refit(found, start, shared.hessian[self.kept][:, self.kept], REFIT_STEPS, self._pool)


def _chosen(job: WidthJob, spec: LinearSpec, weight: Tensor, wanted: LinearStats) -> Tensor:
    """The inputs that stay, (kept,) int64 sorted."""
    cut, neurons = job.cut, spec.name.endswith(job.layout.down)
    (sections, keep), size = ((1, cut.neurons), 1) if neurons else (cut.sections, cut.head_dim)
    if (listed := job.decided.get(NEURONS_KEPT if neurons else HEADS_KEPT)) is not None:
        groups = torch.tensor(listed[str(spec.block)])
    else:
        factored = cholesky(wanted.hessian, job.method.damp_frac)
        if factored is None:
            raise _unusable(spec)
        if job.method.importance == "repair":
            hessian = damped(wanted.hessian, factored.damp_frac)
            groups = width.survivors(weight, hessian, sections, size, keep)
        else:
            score = width.activation if job.method.importance == "activation" else width.feature
            groups = width.highest(score(weight, wanted.hessian), sections, size, keep)
    return (groups.unsqueeze(1) * size + torch.arange(size)).reshape(-1)


def _consumes(job: WidthJob, spec: LinearSpec) -> bool:
    """Whether neurons or heads feed this linear."""
    return spec.name.endswith((job.layout.out, job.layout.down))


def _unusable(spec: LinearSpec) -> WorkError:
    return WorkError(
        f"no damping makes the second moments of {spec.name}'s inputs positive definite",
        "calibrate on more text, or check the source model with `compress eval`",
    )


def _written(job: WidthJob, spec: LinearSpec) -> Tensor:
    """The outputs that stay, as far as they are channels of the stream: (rows,) int64 sorted."""
    if job.channels is not None and _consumes(job, spec):
        return job.channels
    return torch.arange(spec.out_features)


def _keep_bias(job: WidthJob, result: NarrowBlock, spec: LinearSpec, rows: Tensor, live: nn.Module) -> None:
    """The entries of a bias for the rows that stay; the live one gets zeros for the others."""
    name = f"{spec.name}.bias"
    if name not in job.checkpoint.index or len(rows) == spec.out_features:
        return
    stored = read_finite(job.checkpoint, name)
    result.tensors[name] = stored[rows].contiguous()
    parameter = cast(nn.Parameter, live.bias)
    whole = torch.zeros_like(parameter.data)
    whole[rows] = stored[rows].to(parameter.dtype)
    parameter.data = whole


def _mend_behind(
    job: WidthJob,
    result: NarrowBlock,
    spec: LinearSpec,
    weight: Tensor,
    whole: Tensor,
    sample: Tensor,
    reference: Tensor | None,
    live: Mapping[str, nn.Module],
) -> None:
    """The norm between a consumer and the stream, where channels go and the family has one.

    weight, whole (out, in): as it was and with zeros; sample, reference as `errors` takes them.
    """
    end = next((norm for end, norm in job.layout.behind.items() if spec.name.endswith(end)), None)
    if end is None or job.channels is None:
        return
    (name,) = (each for each in live if each.endswith(end))
    name_of_bias = f"{spec.name}.bias"
    bias = read_finite(job.checkpoint, name_of_bias).float() if name_of_bias in job.checkpoint.index else 0.0
    wanted = (sample if reference is None else reference) @ weight.T + bias
    stays = torch.zeros(spec.out_features)
    stays[job.channels] = 1.0
    found = sample @ whole.T + bias * stays
    result.tensors[f"{name}.weight"] = width_norms.mended_norm(job, f"{name}.weight", live[name], found, wanted)
    result.repaired.add(f"{name}.weight")


def _keep_rows(job: WidthJob, result: NarrowBlock, spec: LinearSpec, kept: Tensor) -> None:
    """The rows of a linear, and of its bias, that feed what stays."""
    (axis, *_) = job.layout.axes_of(spec.weight) or (None,)
    assert axis is not None
    rows = job.cut.rows(axis, kept)
    if len(rows) == spec.out_features:
        return
    for name, at in ((spec.weight, int(spec.layout == "conv1d")), (f"{spec.name}.bias", 0)):
        if name in job.checkpoint.index:
            now = result.tensors.get(name)
            whole = read_finite(job.checkpoint, name) if now is None else now
            result.tensors[name] = whole.index_select(at, rows).contiguous()


def _report(
    job: WidthJob, spec: LinearSpec, result: NarrowBlock, output_error: float | None, sqnr: float | None
) -> LayerRecord:
    """The shape (out, in) as it is now and was, and how many parameters went, the bias's counted."""
    index, names = job.checkpoint.index, (spec.weight, f"{spec.name}.bias")
    lost = sum(math.prod(index[name].shape) - result.tensors[name].numel() for name in names if name in result.tensors)
    now = result.tensors.get(spec.weight)
    now = now.T if now is not None and spec.layout == "conv1d" else now
    shape: list[JsonValue] = [spec.out_features, spec.in_features]
    details: dict[str, JsonValue] = {
        "shape": shape if now is None else list(now.shape),
        "source_shape": shape,
        "removed": lost,
    }
    if now is not None and zero_mask(read_finite(job.checkpoint, spec.weight)) is not None:
        zeros = int((now == 0).sum())
        details |= {"sparsity": zeros / now.numel(), "zeros": zeros, "weights": now.numel()}
    return LayerRecord(
        name=spec.name,
        block=spec.block,
        method=job.method_name,
        scheme=job.label,
        bits_per_weight=8.0 * index[spec.weight].dtype.itemsize,
        output_error=output_error,
        weight_sqnr_db=sqnr,
        details=details,
    )

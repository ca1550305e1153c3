"""One block cut in width: heads and neurons at the linears that they feed, the consumers, whose outputs are the stream,
and channels wherever the stream is read.

Each linear that lost inputs is repaired for it, and its bias takes up the mean of what they gave, where it has one.
What adds to the stream makes up for what earlier blocks have lost of it too, as far as its inputs tell (`stream.py`).

The live block keeps its width, with zero columns where inputs went: it computes what the narrow one will, so one pass
serves choosing, repairing and going on. What stays is chosen by what the original model feeds the linear, so that a
cut is the same with and without repair.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from compress.artifact.layers import LayerRecord
from compress.artifact.manifest import Fallback
from compress.calibration.staged import StagedForward
from compress.models.skeleton import LinearSpec
from compress.pipeline import width_experts, width_norms, width_plain
from compress.pipeline.block import Workers
from compress.pipeline.inputs import Activations
from compress.pipeline.linears import put_dense
from compress.pipeline.routing import Routing
from compress.pipeline.source import read_finite, read_weight
from compress.pipeline.twin import Pair, pairs, streams_of, twin_of
from compress.pipeline.width_job import WidthJob
from compress.pipeline.width_repair import Affine, Lost, Shared, bias_dtype, bias_of, put_live_bias
from compress.pruning.masks import zero_mask
from compress.recipe_sections import CalibrationConfig


@dataclass
class NarrowBlock:
    """tensors: what changed, by checkpoint name. repaired: names of weights that have new values besides; what learnt
    otherwise than asked is in `fallbacks`."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    repaired: set[str] = field(default_factory=set)
    layers: list[LayerRecord] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)
    activations: Activations | None = None


def through_block(job: WidthJob, block: int, entering: Activations, workers: Workers) -> NarrowBlock:
    """Cuts one block; `entering` must hold the original model's activations too."""
    skeleton, result, channels = job.skeleton, NarrowBlock(), job.channels
    known = None if job.moments is None else job.moments.of(block, workers)
    of_experts = width_experts.of_block(job, block, entering, workers)
    module = skeleton.materialise(block)
    live = skeleton.modules(block, module)
    specs = {spec.name: spec for spec in skeleton.linears(block)}
    if channels is not None:
        specs |= {spec.name: spec for spec in width_experts.routers(job, block)}
        result.tensors |= width_norms.narrow_norms(job, skeleton.block_tensors(block), live)
    watched = [spec for spec in specs.values() if job.consumes(spec) or (channels is not None and job.reads(spec))]
    routing = Routing.of(job.stage.calibration, module) if known is None else Routing(CalibrationConfig(), None)
    streams = streams_of(job, entering, block) if job.method.repair and known is None else None
    places = {**routing.watched, **({} if streams is None else streams[0].watched(live))}
    places |= {spec.name: live[spec.name] for spec in watched}
    forward = StagedForward(entering.runs(skeleton, module), places, workers.count)
    twin = twin_of(job, entering, watched, block, workers, streams)
    assert twin is not None
    found: dict[str, tuple[float | None, float | None]] = {}
    kept_of: dict[str, Tensor] = {}
    shared: Shared | None = None

    def cut(spec: LinearSpec, pair: Pair | None) -> None:
        nonlocal shared
        bias = bias_of(job, spec)
        if pair is None or shared is None or not pair.stage.same_input or shared.centred != (bias is not None):
            kept, told = of_experts.get(spec.name), known
            if (fallback := width_experts.fallback(job, spec, known, pair)) is not None:
                result.fallbacks.append(fallback)
            if width_experts.unseen(spec, known, pair):
                kept, told = width_experts.by_weights(job, spec), None
            shared = Shared(job, spec, pair, told, bias is not None, workers, kept)
        weight, rows = read_weight(job.checkpoint, spec), job.written(spec)
        kept_of[spec.name] = shared.kept
        lost = None if pair is None else Lost.of(pair, bias is not None, workers.pool)
        narrow = shared.narrowed(weight, lost)[rows].to(job.checkpoint.index[spec.weight].dtype)
        whole = torch.zeros_like(weight)
        whole[rows[:, None], shared.kept] = narrow.float()
        put_dense(live[spec.name], whole)
        before, after = Affine(weight, bias), Affine(whole, shared.bias(bias, weight, whole, rows, lost))
        _put_bias(job, result, spec, rows, after.bias, live[spec.name])
        found[spec.name] = before.errors(after, rows, *((None, None) if pair is None else pair.samples()))
        if job.method.repair and not width_experts.unseen(spec, known, pair):
            result.repaired.add(spec.weight)
            if pair is not None:
                _mend_behind(job, result, spec, before, after, pair, live)
        elif narrow.shape == weight.shape:
            return  # nothing to do here: as it was
        result.tensors[spec.weight] = narrow.T.contiguous() if spec.layout == "conv1d" else narrow
        if len(shared.kept) < spec.in_features and job.consumes(spec):
            _keep_producers(job, result, spec, specs.values(), shared.kept)

    with closing(pairs(forward, twin, entering, watched, routing=routing, streams=streams)) as reached:
        for pair in reached:
            cut(specs[pair.stage.name], pair)
    for spec in watched:
        if spec.name not in found:  # experts that no token reached
            cut(spec, None)
    routing.close()
    changed = [spec for spec in skeleton.linears(block) if spec.name in found or spec.weight in result.tensors]
    for spec in changed:
        record, fallbacks = routing.told(spec, _report(job, spec, result, *found.get(spec.name, (None, None))))
        result.layers.append(record)
        result.fallbacks += fallbacks
    plain = width_plain.through_block(job, block, entering, kept_of, specs)
    result.activations = replace(entering.advanced(forward.outputs, twin.outputs), plain=plain)
    return result


def _put_bias(
    job: WidthJob, result: NarrowBlock, spec: LinearSpec, rows: Tensor, bias: Tensor | None, live: nn.Module
) -> None:
    """Gives the live linear a bias (out,), and stores the entries for the rows that stay; unless it is as it was."""
    if bias is None or (len(rows) == spec.out_features and not job.method.repair):
        return
    name = f"{spec.name}.bias"
    result.tensors[name] = bias[rows].to(bias_dtype(job, spec))
    if job.method.repair:
        result.repaired.add(name)
    put_live_bias(live, bias)


def _mend_behind(
    job: WidthJob,
    result: NarrowBlock,
    spec: LinearSpec,
    before: Affine,
    after: Affine,
    pair: Pair,
    live: Mapping[str, nn.Module],
) -> None:
    """The norm between a consumer and the stream, where channels go and the family has one."""
    end = next((norm for end, norm in job.layout.behind.items() if spec.name.endswith(end)), None)
    if end is None or job.channels is None:
        return
    (name,) = (each for each in live if each.endswith(end))
    sample, reference = pair.samples()
    wanted, found = before(sample if reference is None else reference), after(sample)
    result.tensors[f"{name}.weight"] = width_norms.mended_norm(job, f"{name}.weight", live[name], found, wanted)
    result.repaired.add(f"{name}.weight")


def _keep_producers(
    job: WidthJob, result: NarrowBlock, spec: LinearSpec, others: Iterable[LinearSpec], kept: Tensor
) -> None:
    """Of the linears that make the neurons or heads which feed `spec`, in the same module as it, what feeds `kept`."""
    module = spec.name.rpartition(".")[0]
    for producer in others:
        fed = job.layout.feeds(producer.weight)
        if fed is not None and spec.name.endswith(fed) and producer.name.rpartition(".")[0] == module:
            _keep_rows(job, result, producer, kept)


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
    if now is not None and zero_mask(read_finite(job.checkpoint, spec.weight), spec.name in job.sparse) is not None:
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

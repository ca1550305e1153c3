"""A cut in experts in the loop over blocks: chosen on the block as it is, then the block goes on without them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from compress.artifact.layers import LayerRecord
from compress.models.experts import Experts, keep_rows
from compress.models.skeleton import LinearSpec
from compress.pipeline import experts_error, inputs, output, stats_cache
from compress.pipeline.block import Workers
from compress.pipeline.cut_stage import CutKind
from compress.pipeline.experts_job import EXPERTS, SALIENCY, ExpertsJob, config_of
from compress.pipeline.inputs import Activations
from compress.pipeline.kinds import Fate, Written
from compress.pipeline.source import read_finite
from compress.progress import Progress
from compress.pruning import experts


class ExpertsKind(CutKind[ExpertsJob]):
    """As `kinds.Kind` has it."""

    def doing(self, job: ExpertsJob) -> str:
        return f"cutting experts ({job.cut.kept} of {job.cut.experts})"

    def decide(self, job: ExpertsJob, workers: Workers, progress: Progress) -> dict[str, Any] | None:
        if job.method.measured == "block":
            return None
        found = stats_cache.measured(job, EXPERTS, {}, lambda: _of_model(job, workers, progress), progress)
        return {SALIENCY: {name: saliency.tolist() for name, saliency in sorted(found.items())}}

    def through_block(self, job: ExpertsJob, block: int, entering: Activations | None, workers: Workers) -> Written:
        assert entering is not None
        module = job.skeleton.materialise(block)
        specs = [spec for spec in job.skeleton.linears(block) if spec.expert is not None]
        tensors: dict[str, Tensor] = {}
        fate: Fate = {}
        layers = []
        if specs:
            kept, worth = _chosen(job, block, module, entering, workers)
            _cut(job, module, kept)
            tensors, fate = _stored(job, block, specs, kept.tolist())
            layers = [_report(job, specs, kept.tolist(), worth.tolist())]
        leaving = list(workers.pool.map(lambda run: run(), entering.runs(job.skeleton, module)))
        rest = [name for name in job.skeleton.block_tensors(block) if name not in fate]
        tensors, fate = output.keep(job, rest, tensors, fate)
        return Written(tensors, fate, layers=layers, activations=entering.advanced(leaving))

    def config(self, job: ExpertsJob) -> dict[str, Any]:
        return config_of(job)


def _of_model(job: ExpertsJob, workers: Workers, progress: Progress) -> dict[str, Tensor]:
    """What every expert adds in the model before any of it is cut, (experts,) float64 by the number of the block."""
    assert job.calibration is not None
    skeleton, found = job.skeleton, {}
    entering = inputs.enter(skeleton, job.calibration.tokens, False)
    progress.begin("measuring what experts add", skeleton.num_blocks)
    for block in range(skeleton.num_blocks):
        module = skeleton.materialise(block)
        if any(spec.expert is not None for spec in skeleton.linears(block)):
            found[str(block)] = _saliency(job, module, entering, workers)
        entering = entering.advanced(list(workers.pool.map(lambda run: run(), entering.runs(skeleton, module))))
        progress.advance(f"block {block}: measured")
    progress.end()
    return found


def _mixture(job: ExpertsJob, module: nn.Module) -> tuple[Experts, nn.Module]:
    """The experts and the router of a live block."""
    family = job.skeleton.family
    assert family.experts is not None
    return cast(Experts, module.get_submodule(family.experts.path)), module.get_submodule(family.routers[0])


def _saliency(job: ExpertsJob, module: nn.Module, entering: Activations, workers: Workers) -> Tensor:
    """The mean norm of what each expert adds to its tokens, router weight included: (experts,), zero without tokens."""
    mixture, _ = _mixture(job, module)
    local = threading.local()

    def observe(number: int, added: Tensor) -> None:
        local.sums[number] += added.float().norm(dim=1).sum(dtype=torch.float64)
        local.tokens[number] += added.shape[0]

    def measured(run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        local.sums, local.tokens = torch.zeros(2, job.cut.experts, dtype=torch.float64).unbind()
        run()
        return local.sums, local.tokens

    mixture.observe = observe
    found = list(workers.pool.map(measured, entering.runs(job.skeleton, module)))
    mixture.observe = None
    sums, tokens = (torch.stack(parts).sum(0) for parts in zip(*found, strict=True))
    return sums / tokens.clamp(min=1)


def _chosen(
    job: ExpertsJob, block: int, module: nn.Module, entering: Activations, workers: Workers
) -> tuple[Tensor, Tensor]:
    """The experts that stay, sorted int64, and what each is worth: (experts,) float64."""
    cut = job.cut
    if job.method.choose == "error":
        return experts_error.staying(job, module, entering, workers)
    if (known := job.decided.get(SALIENCY)) is None:
        saliency = _saliency(job, module, entering, workers)
    else:
        saliency = torch.tensor(known[str(block)], dtype=torch.float64)
    if job.method.choose == "clusters":
        router = cast(Tensor, _mixture(job, module)[1].weight)
        return experts.representatives(router.float(), cut.kept, cut.groups), saliency
    return experts.most_salient(saliency, cut.kept, cut.groups), saliency


def _cut(job: ExpertsJob, module: nn.Module, kept: Tensor) -> None:
    """Takes the other experts out of the live block."""
    mixture, router = _mixture(job, module)
    family = job.skeleton.family
    assert family.experts is not None
    parent, _, leaf = family.experts.path.rpartition(".")
    setattr(module.get_submodule(parent), leaf, Experts(mixture[number] for number in kept.tolist()))
    keep_rows(router, kept, job.cut.experts)


def _stored(job: ExpertsJob, block: int, specs: list[LinearSpec], kept: list[int]) -> tuple[dict[str, Tensor], Fate]:
    """The experts that stay under their new numbers, and the router's rows for them."""
    tensors: dict[str, Tensor] = {}
    fate: Fate = {}
    for spec in specs:
        if spec.expert not in kept:
            fate[spec.weight] = ("dropped", [])
            continue
        name = spec.weight.replace(f".experts.{spec.expert}.", f".experts.{kept.index(spec.expert)}.")
        tensors[name] = read_finite(job.checkpoint, spec.weight)
        fate[spec.weight] = ("kept", [name])
    for name in job.skeleton.router_tensors(block):
        tensors[name] = read_finite(job.checkpoint, name)[torch.tensor(kept)].contiguous()
        fate[name] = ("pruned", [name])
    return tensors, fate


def _report(job: ExpertsJob, specs: list[LinearSpec], kept: list[int], worth: list[float]) -> LayerRecord:
    """One record of the mixture: which experts stay, by their numbers in the source, and what each was worth."""
    cut, first = job.cut, specs[0]
    mixtures = len({spec.block for spec in job.skeleton.linears() if spec.expert is not None})
    return LayerRecord(
        name=first.name.split(f".{first.expert}.")[0],
        block=first.block,
        method=job.method_name,
        scheme=job.label,
        details={
            "removed": (cut.all_parameters - cut.parameters) // mixtures,
            "kept": list(kept),
            "cost_alone" if job.method.choose == "error" else "saliency": list(worth),
        },
    )

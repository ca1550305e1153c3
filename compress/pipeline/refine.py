"""After the last block: scales and norms tuned end to end on the KL to the original model (EfficientQAT's second phase,
arXiv:2407.11062, with the original's distributions in place of labels); then, if asked for, codes and zero points.

Shapes and dtypes stay, so the artifact has the same format and the same bytes. Some windows are held out: they choose
the best state, the one before the first step included, and teach nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from compress.artifact.layers import LayerRecord
from compress.artifact.manifest import Fallback
from compress.calibration.batches import batches, split
from compress.errors import WorkError
from compress.formats import layouts
from compress.models.skeleton import LinearSpec
from compress.pipeline import moves, redrawn
from compress.pipeline.block import Workers
from compress.pipeline.job import Job
from compress.pipeline.kinds import Fate, Written
from compress.pipeline.linears import errors
from compress.pipeline.source import read_weight
from compress.pipeline.tuned_model import TunedModel
from compress.progress import Progress
from compress.quantization.configs import AwqConfig, RefineConfig, SmoothQuantConfig
from compress.quantization.tuning import TunedScales, TunedVector

WARM_UP = 5


def refine(
    job: Job,
    settings: RefineConfig,
    stored: Mapping[str, Tensor],
    layers: Sequence[LayerRecord],
    workers: Workers,
    progress: Progress,
) -> Written:
    """Tunes what the block loop has written; returns what changed, with reports that replace those of the same linear.

    Args:
        stored: every tensor written so far, by name.
        layers: the reports so far.

    Raises:
        UserError: too few calibration windows to hold any out.
        WorkError: the divergence from the original is not finite.
    """
    assert job.calibration is not None
    assert job.stage.calibration is not None
    tokens, samples = job.calibration.tokens, job.stage.calibration.samples
    learning, held = split(samples, settings.held_out)
    learning = redrawn.learning(learning, samples, len(tokens))
    model = TunedModel(job, stored, tokens, workers)
    before = _finite(model.divergence(held))
    began = {name: tuned.codes for name, tuned in model.tuned.items() if isinstance(tuned, TunedScales)}
    after = _tune(model, settings, learning, held, before, job.recipe.seed, progress)
    if settings.code_rounds:
        after = moves.move(job, model, settings.code_rounds, learning, held, after, progress)
    if not after < before:
        fallback = Fallback(name="refine", action="left as it was", reason="no state was better on held-out windows")
        return Written({}, {}, fallbacks=[fallback])
    tensors, fate = _written(job, model, stored)
    divergence = {"kl_before": before, "kl_after": after}
    return Written(tensors, fate, layers=list(_reports(job, model, layers, divergence, began)))


def _tune(
    model: TunedModel,
    settings: RefineConfig,
    learning: Sequence[int],
    held: Sequence[int],
    before: float,
    seed: int,
    progress: Progress,
) -> float:
    """Takes all steps and leaves the model in its best state; returns that state's held-out divergence."""
    scales = [tuned.change for tuned in model.tuned.values() if isinstance(tuned, TunedScales)]
    norms = [tuned.change for tuned in model.tuned.values() if isinstance(tuned, TunedVector)]
    groups = [{"params": scales, "lr": settings.scale_rate}, {"params": norms, "lr": settings.norm_rate}]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]], betas=(0.9, 0.99), eps=1e-12)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP) * (1 - step / settings.steps)
    )
    drawn = batches(learning, settings.windows, seed)
    best, kept = before, _state(model)
    every = max(1, settings.steps // settings.checks)
    progress.begin("tuning scales and norms", settings.steps)
    for step in range(1, settings.steps + 1):
        seen = _finite(model.learn(next(drawn)))
        optimizer.step()
        rates.step()
        model.follow()
        note = f"KL {seen:.5f}"
        if step % every == 0 or step == settings.steps:
            found = _finite(model.divergence(held))
            note = f"held-out KL {found:.5f} (at first {before:.5f})"
            if found < best:
                best, kept = found, _state(model)
        progress.advance(note)
    for name, change in kept.items():
        model.tuned[name].change.data.copy_(change)
    model.follow()
    progress.end()
    return best


def _state(model: TunedModel) -> dict[str, Tensor]:
    return {name: tuned.change.detach().clone() for name, tuned in model.tuned.items()}


def _finite(divergence: float) -> float:
    if not math.isfinite(divergence):
        raise WorkError(
            "the quantised model's distributions are not finite, so there is nothing to refine",
            "leave --refine out, and score the result with `compress eval`",
        )
    return divergence


def _written(job: Job, model: TunedModel, stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Fate]:
    """The tensors that changed, and the fate of their source tensors with all that these have become."""
    tensors: dict[str, Tensor] = {}
    fate: Fate = {}
    for name, tuned in model.tuned.items():
        if isinstance(tuned, TunedVector):
            tensors[name] = tuned.dense()
            fate[name] = ("trained", [name])
            continue
        packed = {f"{name}.{part}": tensor for part, tensor in layouts.pack(tuned.quantized()).items()}
        tensors |= {part: tensor for part, tensor in packed.items() if not torch.equal(tensor, stored[part])}
        into = [f"{name}.{part}" for part in layouts.PARTS if f"{name}.{part}" in stored]
        fate[f"{name}.weight"] = ("quantized", into)
    return tensors, fate


def _reports(
    job: Job,
    model: TunedModel,
    layers: Sequence[LayerRecord],
    divergence: Mapping[str, float],
    began: Mapping[str, Tensor],
) -> Iterator[LayerRecord]:
    """The reports of the tuned linears, with their errors as they are now; began: their codes at the start.

    Where the method folded scales into linears, their weights and inputs are not those of the original any more, and
    there is nothing to measure them against.
    """
    specs = {spec.name: spec for spec in job.skeleton.linears()}
    sampled, folded = model.sampled(), isinstance(job.stage.method, AwqConfig | SmoothQuantConfig)
    for layer in layers:
        tuned = model.tuned.get(layer.name)
        if not isinstance(tuned, TunedScales):
            continue
        error, sqnr = None, None
        if not folded:
            error, sqnr = _errors(job, specs[layer.name], tuned, model, sampled)
        moved = float(tuned.change.detach().square().mean().sqrt())
        refined = {**divergence, "scale_change_rms": moved}
        if job.stage.refine is not None and job.stage.refine.code_rounds:
            refined["codes_moved"] = float((tuned.codes != began[layer.name]).float().mean())
        details = {**layer.details, "refined": refined}
        yield layer.model_copy(update={"output_error": error, "weight_sqnr_db": sqnr, "details": details})


def _errors(
    job: Job, spec: LinearSpec, tuned: TunedScales, model: TunedModel, sampled: Mapping[str, Tensor]
) -> tuple[float | None, float | None]:
    """(relative output error, SQNR); the first is None for experts, which see other tokens in each of the models."""
    dense, weight = tuned.dense().float(), read_weight(job.checkpoint, spec)
    now, then = sampled.get(spec.name), model.samples.get(spec.name)
    if spec.expert is not None or now is None or then is None:
        return errors(weight, dense, None, None)
    return errors(weight, dense, now, then)

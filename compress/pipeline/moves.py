"""After scales and norms are tuned: codes and zero points moved by whole steps, as far as the held-out windows agree.

Every round takes the gradient over all windows that teach, and tries shares of all codes, from many to few; the share
that leaves the lowest divergence on the held-out windows is kept, and nothing where none lowers it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compress.pipeline.job import Job
from compress.pipeline.source import read_weight
from compress.pipeline.tuned_model import TunedModel
from compress.progress import Progress
from compress.quantization.configs import GptqConfig
from compress.quantization.moves import Curvature, code_promise, moved, zero_point_promise
from compress.quantization.tuning import TunedScales
from compress.types import QuantizedTensor

SHARES = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
DRAWN_WINDOWS = 64
"""On so many windows the curvature is drawn; more change little, because it has few free numbers."""

Promises = Mapping[str, tuple[Tensor, Tensor]]


def move(
    job: Job,
    model: TunedModel,
    rounds: int,
    learning: Sequence[int],
    held: Sequence[int],
    best: float,
    progress: Progress,
) -> float:
    """Moves what pays, and leaves the model in its best state; returns that state's held-out divergence.

    best: the held-out divergence as the model is.
    """
    linears = {name: tuned for name, tuned in model.tuned.items() if isinstance(tuned, TunedScales)}
    fixed = _fixed(job, linears)
    progress.begin("moving codes", rounds)
    curvature = _curvature(model, linears, learning[:DRAWN_WINDOWS], job.recipe.seed)
    shares: Sequence[float] = SHARES
    for _ in range(rounds):
        slopes = model.slopes(learning)
        promises: dict[str, tuple[Tensor, Tensor]] = {}
        for name, tuned in linears.items():
            now, slope = tuned.quantized(), slopes.pop(name)
            still, bends = fixed.get(name), curvature[name]
            codes = code_promise(now, slope, bends.of_weights(), still)
            promises[name] = codes, zero_point_promise(now, slope, bends.of_groups(), still)
        found = _tried(model, linears, promises, shares, held, best)
        if found is None:
            break
        best, share = found
        shares = tuple(each for each in shares if each <= share)
        progress.advance(f"{share:.2%} of the codes: held-out KL {best:.5f}")
    progress.end()
    return best


def _tried(
    model: TunedModel,
    linears: Mapping[str, TunedScales],
    promises: Promises,
    shares: Sequence[float],
    held: Sequence[int],
    best: float,
) -> tuple[float, float] | None:
    """The lowest held-out divergence and the share of codes that gave it, with the model so; None: as it was."""
    before = {name: tuned.quantized() for name, tuned in linears.items()}
    magnitudes = torch.cat([codes.abs().flatten() for codes, _ in promises.values()])
    found: tuple[float, float, dict[str, QuantizedTensor]] | None = None
    for share in shares:
        least = float(torch.topk(magnitudes, max(1, int(share * magnitudes.numel()))).values[-1])
        if least <= 0:
            continue
        after = {name: moved(before[name], *promises[name], least) for name in linears}
        _put(model, linears, after)
        divergence = model.divergence(held)
        if divergence < best:
            best, found = divergence, (divergence, share, after)
        elif found is not None:
            break
    _put(model, linears, before if found is None else found[2])
    return None if found is None else found[:2]


def _put(model: TunedModel, linears: Mapping[str, TunedScales], weights: Mapping[str, QuantizedTensor]) -> None:
    for name, tuned in linears.items():
        tuned.take(weights[name].codes, weights[name].zero_point)
    model.follow()


def _curvature(
    model: TunedModel, linears: Mapping[str, TunedScales], windows: Sequence[int], seed: int
) -> dict[str, Curvature]:
    found = {name: Curvature(tuned.codes.shape, tuned.scheme) for name, tuned in linears.items()}
    for drawn, tokens in model.draws(windows, seed):
        for name, gradient in drawn.items():
            found[name].add(gradient, tokens)
    return found


def _fixed(job: Job, linears: Mapping[str, TunedScales]) -> dict[str, Tensor]:
    """Of each linear that has any: the weights (out, in) bool that were pruned, in the source or with this stage."""
    pruning = isinstance(job.rounding, GptqConfig) and job.rounding.to_sparsity() is not None
    found = {}
    for spec in job.skeleton.linears():
        if spec.name in linears:
            zeros = read_weight(job.checkpoint, spec) == 0
            if pruning:
                zeros |= linears[spec.name].dense() == 0
            if zeros.any():
                found[spec.name] = zeros
    return found

"""AutoRound: a block's rounding is learnt against what the original block gives behind the original blocks.

Every window is a task of its own, and gradients are summed in the order of the windows, so that the result does not
depend on how many tasks run at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.calibration.batches import split
from compress.calibration.staged import StagedForward
from compress.calibration.statistics import collect_groups
from compress.errors import WorkError
from compress.models.skeleton import LinearSpec
from compress.pipeline.block import BlockResult, OpenBlock, Workers, open_block, stages
from compress.pipeline.inputs import Activations
from compress.pipeline.job import Job
from compress.pipeline.linears import ROWS_PER_TILE, UNSEEN, finished, put, rounded
from compress.pipeline.twin import pairs, twin_of
from compress.quantization.autoround import TunedRounding, tune
from compress.quantization.configs import AutoRoundConfig
from compress.quantization.grid import Grid, search_grid


def through_block(
    job: Job,
    method: AutoRoundConfig,
    specs: Sequence[LinearSpec],
    block: int,
    entering: Activations,
    workers: Workers,
) -> BlockResult:
    """One forward to know the inputs of each linear, the steps, and one forward through what they leave."""
    opened, result = open_block(job, block), BlockResult()
    unseen = {spec.name: spec for spec in specs}
    weights = _begun(job, specs, opened, entering, workers)
    for name in weights:
        del unseen[name]
    for spec in unseen.values():  # experts that no token of the calibration text reached
        linear = rounded(job, spec, opened.weight(job, spec), UNSEEN, workers.pool)
        put(opened.live[spec.name], linear.quantized)
        result.linears.append(linear)
    tuning = _Tuning(job, opened, weights, block, entering, workers)
    learning, deciding = split(tuning.count, method.held_out)
    first, best = tune(
        list(weights.values()), tuning.learn, lambda: tuning.loss(deciding), learning, method,
        job.recipe.seed + block, tuning.follow,
    )  # fmt: skip
    if not first < float("inf"):
        raise WorkError(
            f"block {block} gives outputs that are not finite, so there is nothing to learn from",
            "the source model may overflow in this dtype; check it with `compress eval`",
        )
    watched = {name: opened.live[name] for name in weights}
    forward = StagedForward(entering.runs(job.skeleton, opened.module), watched, workers.count)
    twin = twin_of(job, entering, [spec for spec in specs if spec.name in weights], block, workers)
    by_name = {spec.name: spec for spec in specs}
    with closing(pairs(forward, twin, entering, specs)) as reached:
        for pair in reached:
            spec = by_name[pair.stage.name]
            details: dict[str, float | int | str | bool | None] = {"block_loss_before": first, "block_loss": best}
            result.linears.append(
                finished(
                    job, spec, weights[spec.name].quantized(), opened.weight(job, spec), *pair.samples(),
                    details=details,
                )
            )  # fmt: skip
    result.activations = entering.advanced(forward.outputs, [] if twin is None else twin.outputs)
    return result


def _begun(
    job: Job, specs: Sequence[LinearSpec], opened: OpenBlock, entering: Activations, workers: Workers
) -> dict[str, TunedRounding]:
    """Every linear that a token reaches, on scales by the second moments of its inputs in the block as it was."""
    by_name = {spec.name: spec for spec in specs}
    watched = {name: opened.live[name] for name in by_name}
    forward = StagedForward(entering.runs(job.skeleton, opened.module), watched, workers.count)
    found: dict[str, TunedRounding] = {}
    moments: Tensor | None = None
    with closing(stages(forward)) as reached:
        for stage in reached:
            spec = by_name[stage.name]
            scheme, dtype = job.integers(spec), job.scale_dtype(spec)
            if moments is None or not stage.same_input or moments.shape[0] != scheme.groups(spec.in_features):
                moments = collect_groups(stage.inputs, scheme.groups(spec.in_features), workers.pool).blocks
            weight, importance = opened.weight(job, spec), moments

            def searched(rows: Tensor) -> Grid:
                return search_grid(rows, scheme, dtype, importance)  # noqa: B023

            tiles = list(workers.pool.map(searched, weight.split(ROWS_PER_TILE)))
            zeros = [tile.zero_point for tile in tiles if tile.zero_point is not None]
            scale = torch.cat([tile.scale for tile in tiles])
            found[spec.name] = TunedRounding(weight, Grid(scale, torch.cat(zeros) if zeros else None, scheme))
    return {spec.name: found[spec.name] for spec in specs if spec.name in found}


class _Tuning:
    """The live block on the weights as they are tuned, and the outputs that it should have.

    `count` is the number of windows.
    """

    def __init__(
        self,
        job: Job,
        opened: OpenBlock,
        weights: dict[str, TunedRounding],
        block: int,
        entering: Activations,
        workers: Workers,
    ) -> None:
        self._skeleton, self._module, self._workers = job.skeleton, opened.module, workers
        self._call = entering.single[block]
        original = job.skeleton.materialise(block)
        with torch.inference_mode():
            wanted = list(workers.pool.map(lambda run: run(), entering.original_runs(job.skeleton, original)))
        job.skeleton.release(original)
        # What inference mode has made cannot take part in gradients; a copy can.
        self._inputs = [window.clone() for chunk in entering.quantized for window in chunk.split(1)]
        self._wanted = [window.clone() for chunk in wanted for window in chunk.split(1)]
        self.count = len(self._inputs)
        self._unit = 1.0 / max(sum(float(w.float().square().sum()) for w in self._wanted) / self.count, 1e-30)
        for parameter in opened.module.parameters():
            parameter.requires_grad_(False)
        self._weights = list(weights.values())
        self._live = [opened.live[name] for name in weights]
        self.follow()

    def follow(self) -> None:
        """Gives the live linears the weights that would be stored now."""

        def dense(weight: TunedRounding, live: nn.Module) -> None:
            put(live, weight.quantized())
            cast(nn.Parameter, live.weight).requires_grad_(True)

        list(self._workers.pool.map(dense, self._weights, self._live))

    def loss(self, windows: Sequence[int]) -> float:
        """Squared error of the block's outputs over these windows, as a share of their squares."""

        def missed(window: int) -> float:
            with torch.no_grad():
                return float(self._missed(window))

        return sum(self._workers.pool.map(missed, windows)) / len(windows)

    def learn(self, windows: Sequence[int]) -> list[Tensor]:
        """Gradients (out, in) float32 of the loss over these windows, of each weight."""
        parameters = [cast(nn.Parameter, live.weight) for live in self._live]
        sums = [torch.zeros(parameter.shape) for parameter in parameters]

        def gradients(window: int) -> Sequence[Tensor | None]:
            with torch.enable_grad():
                return torch.autograd.grad(self._missed(window), parameters, allow_unused=True)

        for found in self._workers.pool.map(gradients, windows):
            for summed, gradient in zip(sums, found, strict=True):
                if gradient is not None:
                    summed += gradient
        return [s.T if isinstance(live, Conv1D) else s for s, live in zip(sums, self._live, strict=True)]

    def _missed(self, window: int) -> Tensor:
        output = self._skeleton.run_block(self._module, self._inputs[window], self._call)
        return (output.float() - self._wanted[window].float()).square().sum() * self._unit

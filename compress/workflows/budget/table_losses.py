"""What it costs to round the embedding, the head, or the one table that both are, under each option."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from compress.calibration.statistics import collect
from compress.models.skeleton import LinearSpec, Skeleton
from compress.models.tables import entering_head, is_tied
from compress.pipeline.block import Workers
from compress.pipeline.inputs import Activations
from compress.pipeline.linears import in_tiles
from compress.pipeline.source import read_weight
from compress.pipeline.tables_stage import TIED_DAMPING
from compress.quantization import gptq
from compress.quantization.configs import GptqConfig
from compress.quantization.grid import quantize, search_grid
from compress.types import IntScheme, QuantizedTensor
from compress.workflows.budget.losses import Measured, Signal, anchors
from compress.workflows.budget.units import Unit

ROWS_PER_TASK = 1024

Divergence = Callable[[Tensor, bool, bool], float]
"""KL with a table (vocabulary, width) in place of the model's: where it is looked up, where it makes logits."""


def measure(
    skeleton: Skeleton,
    units: Sequence[Unit],
    signal: Signal,
    leaving: Activations,
    divergence: Divergence,
    workers: Workers,
) -> Iterator[tuple[Unit, Measured]]:
    """Measures the units of tables one after the other. leaving: the learning text behind the original's last block."""
    tied = is_tied(skeleton)
    counts = torch.bincount(signal.learning.flatten(), minlength=skeleton.vocabulary).float()
    for unit in units:
        (spec,) = unit.linears
        looked_up, multiplied = unit.table == "embeddings", unit.table == "head" or tied
        shared = _shared(skeleton, signal.method, leaving, tied, workers) if multiplied else None
        weight, errors, divergences = read_weight(skeleton.checkpoint, spec), {}, {}
        for option in unit.options:
            found = _rounded(skeleton, spec, weight, option, shared, signal.method, workers)
            table = found.dequantize().float()
            errors[option.label] = _error(weight - table, counts, shared)
            if option in anchors(unit):
                divergences[option.label] = divergence(table, looked_up, multiplied)
        yield unit, Measured(errors, divergences)


def _shared(
    skeleton: Skeleton, method: GptqConfig | None, leaving: Activations, tied: bool, workers: Workers
) -> gptq.Preconditioner:
    chunks = [entering_head(skeleton, hidden).flatten(0, -2) for hidden in leaving.quantized]
    settings = method or GptqConfig.model_validate({"correction": 0.0})
    if tied:
        settings = settings.model_copy(update={"damp_frac": TIED_DAMPING})
    return gptq.Preconditioner(collect(chunks, {}, workers.pool), settings, workers.pool)


def _rounded(
    skeleton: Skeleton,
    spec: LinearSpec,
    weight: Tensor,
    option: IntScheme,
    shared: gptq.Preconditioner | None,
    method: GptqConfig | None,
    workers: Workers,
) -> QuantizedTensor:
    dtype = skeleton.checkpoint.index[spec.weight].dtype
    if method is None or shared is None or shared.factored is None:
        return in_tiles(weight, lambda rows: quantize(rows, search_grid(rows, option, dtype)), workers.pool)
    shared.prepare(option.groups(spec.in_features), workers.pool)
    return in_tiles(weight, lambda rows: gptq.transform(rows, shared, option, method, dtype), workers.pool)


def _error(difference: Tensor, counts: Tensor, shared: gptq.Preconditioner | None) -> float:
    """By the second moments of what it multiplies, or by how often each row is looked up."""
    if shared is None:
        return float(difference.square().sum(1) @ counts)
    parts = ((rows @ shared.hessian) * rows for rows in difference.split(ROWS_PER_TASK))
    return sum(float(part.sum(dtype=torch.float64)) for part in parts)

"""Quantising one linear: rows are independent, so they are worked on in tiles of fixed height, in parallel.

Also how its error is measured for layers.json.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.artifact.layers import LayerRecord
from compress.artifact.manifest import Fallback
from compress.models.skeleton import OUTSIDE, LinearSpec
from compress.pipeline.job import Job
from compress.pipeline.zeros import held
from compress.pruning.masks import zero_mask
from compress.quantization import rtn
from compress.quantization.configs import RtnConfig
from compress.types import QuantizedTensor, Scheme

ROWS_PER_TILE = 128
SAMPLE_TOKENS = 256

UNSEEN = "no calibration token reached it"


@dataclass(frozen=True, eq=False, slots=True)
class QuantizedLinear:
    """One finished linear: what is stored, and what is reported. `input_scale` (1,) where its inputs are static."""

    spec: LinearSpec
    quantized: QuantizedTensor
    record: LayerRecord
    fallbacks: tuple[Fallback, ...] = ()
    input_scale: Tensor | None = None


def in_tiles(
    weight: Tensor, quantize_rows: Callable[[Tensor], QuantizedTensor], pool: Executor, rows: int = ROWS_PER_TILE
) -> QuantizedTensor:
    """Applies `quantize_rows` to tiles of so many rows of weight (out, in) and puts the results together."""
    return join(list(pool.map(quantize_rows, weight.split(rows))))


def join(tiles: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Stacks quantised row tiles; what covers the whole matrix is the same in all."""
    zeros = [tile.zero_point for tile in tiles if tile.zero_point is not None]
    return QuantizedTensor(
        torch.cat([tile.codes for tile in tiles]),
        torch.cat([tile.scale for tile in tiles]),
        torch.cat(zeros) if zeros else None,
        tiles[0].scheme,
        tiles[0].divisor,
    )


def sample_of(chunks: Sequence[Tensor]) -> Tensor:
    """At most SAMPLE_TOKENS rows (tokens, in) float32, evenly spread over the chunks."""
    tokens = sum(chunk.shape[0] for chunk in chunks)
    stride = max(1, tokens // SAMPLE_TOKENS)
    return torch.cat([chunk[::stride] for chunk in chunks])[:SAMPLE_TOKENS].float()


def record(
    spec: LinearSpec,
    method: str,
    weight: Tensor,
    dequantized: Tensor,
    scheme: Scheme,
    bits_per_weight: float,
    sample: Tensor | None,
    reference: Tensor | None = None,
    fallback: str | None = None,
    details: dict[str, float | int | str | bool | None] | None = None,
) -> LayerRecord:
    """The report of one linear.

    weight, dequantized: (out, in) float32. sample: (tokens, in) inputs of the quantised linear; reference: (tokens, in)
    inputs that the original model has for the same tokens, where they are known and differ.
    """
    error, sqnr = errors(weight, dequantized, sample, reference)
    return LayerRecord(
        name=spec.name,
        block=None if spec.block == OUTSIDE else spec.block,
        method=method,
        scheme=scheme.label,
        bits_per_weight=bits_per_weight,
        output_error=error,
        weight_sqnr_db=sqnr,
        fallback=fallback,
        details=dict(details or {}),
    )


def errors(
    weight: Tensor, changed: Tensor, sample: Tensor | None, reference: Tensor | None
) -> tuple[float | None, float | None]:
    """(relative output error, SQNR of the weight in dB) of a changed weight; arguments as for `record`."""
    difference = weight - changed
    noise, signal = float(difference.square().sum()), float(weight.square().sum())
    error = None
    if sample is not None and sample.shape[0]:
        wanted = (sample if reference is None else reference) @ weight.T
        total = float(wanted.square().sum())
        error = _ratio(float((wanted - sample @ changed.T).square().sum()), total)
    return error, 10 * math.log10(ratio) if (ratio := _ratio(signal, noise)) else None


def _ratio(part: float, whole: float) -> float | None:
    """part / whole; None where squares were too large or too small for that."""
    return part / whole if whole > 0 and math.isfinite(part) and math.isfinite(whole) else None


def finished(
    job: Job,
    spec: LinearSpec,
    quantized: QuantizedTensor,
    weight: Tensor,
    sample: Tensor | None = None,
    reference: Tensor | None = None,
    fallback: tuple[str, str] | None = None,
    details: dict[str, float | int | str | bool | None] | None = None,
    input_scale: Tensor | None = None,
    pruned: Tensor | None = None,
) -> QuantizedLinear:
    """A quantised linear with its report.

    weight: (out, in) float32, what was to be quantised; its zeros, where it was pruned, or those of `pruned` (out, in)
    bool, are checked to be zero still. Other arguments as `record` has them. fallback: (what was done other than asked,
    why).
    """
    scheme = job.schemes[spec.name]
    zeros = zero_mask(weight, spec.name in job.sparse) if pruned is None else pruned
    if zeros is not None:
        quantized, moved = held(spec.name, quantized, zeros)
        count = int(zeros.sum())
        details = {**(details or {}), "sparsity": count / zeros.numel(), "zeros": count, "weights": zeros.numel()}
        details |= {"zeros_restored": moved} if moved else {}
    layer = record(
        spec, job.method_name, weight, quantized.dequantize().float(), scheme, job.stored_bits(spec) / weight.numel(),
        sample, reference, fallback[0] if fallback else None, details,
    )  # fmt: skip
    found = (Fallback(name=spec.name, action=fallback[0], reason=fallback[1]),) if fallback else ()
    return QuantizedLinear(spec, quantized, layer, found, input_scale)


def round_searched(
    job: Job, spec: LinearSpec, weight: Tensor, pool: Executor, highest: float | None = None
) -> QuantizedTensor:
    """Rounds to nearest with searched scales; `highest` as `rtn.transform` takes it."""
    scheme, dtype, search = job.schemes[spec.name], job.scale_dtype(spec), RtnConfig(scale_search=True)
    return in_tiles(weight, lambda rows: rtn.transform(rows, scheme, search, dtype, highest), pool)


def rounded(
    job: Job,
    spec: LinearSpec,
    weight: Tensor,
    reason: str,
    pool: Executor,
    highest: float | None = None,
    pruned: Tensor | None = None,
) -> QuantizedLinear:
    """A linear without usable statistics: rounded to nearest, recorded as a fallback; what is `pruned` becomes zero."""
    stays = weight if pruned is None else weight.masked_fill(pruned, 0.0)
    quantized = round_searched(job, spec, stays, pool, highest)
    return finished(job, spec, quantized, weight, fallback=("rtn", reason), pruned=pruned)


def live_weight(module: nn.Module) -> Tensor:
    """The live weight as (out, in)."""
    weight = cast(Tensor, module.weight).data
    return weight.T.contiguous() if isinstance(module, Conv1D) else weight


def put(module: nn.Module, quantized: QuantizedTensor) -> None:
    """Gives a live linear the weight that its quantised form stands for."""
    put_dense(module, quantized.dequantize())


def put_dense(module: nn.Module, weight: Tensor) -> None:
    """Gives a live linear this weight (out, in)."""
    parameter = cast(nn.Parameter, module.weight)
    dense = weight.to(parameter.dtype)
    parameter.data = dense.T.contiguous() if isinstance(module, Conv1D) else dense

"""The embedding before the first block, and a head of its own behind the last one, quantised in slabs of rows.

Blocks learn from hidden states behind the quantised embedding, and a head from those behind the quantised blocks, so
that each makes up for what was lost before it. A tied table is quantised first, as an embedding, and for both of its
uses. A token is looked up about as often as it is predicted, so its row e of the rounding error costs, but for a factor
of its own, e H e^T where it makes logits (H: mean x x^T of what enters the head of the original model), and c e e^T
where it is looked up, as the residual stream begins without a direction. Together they are GPTQ's objective with the
Hessian H + c I, which is damping, of TIED_DAMPING times the mean diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.artifact.layers import LayerRecord
from compress.artifact.manifest import Fallback
from compress.artifact.staging import Staging
from compress.calibration.statistics import LinearStats, collect
from compress.errors import WorkError
from compress.formats import layouts
from compress.formats.int_packed import decode_rows
from compress.models.skeleton import LinearSpec
from compress.models.tables import aliases, entering_head, is_tied
from compress.pipeline.block import Workers
from compress.pipeline.entries import EMBEDDING, HEAD, commit, holds
from compress.pipeline.inputs import Activations, compared
from compress.pipeline.job import Job
from compress.pipeline.kinds import Fate
from compress.pipeline.linears import in_tiles, sample_of
from compress.pipeline.table_error import TableError
from compress.progress import Progress
from compress.quantization import gptq, rtn
from compress.quantization.configs import GptqConfig, RtnConfig
from compress.types import QuantizedTensor

ROWS_AT_A_TIME = 4096
"""Rows of a table that are in memory as floats; a multiple of the 32 whose packed zero points fill words."""
TIED_DAMPING = 0.5
"""Of two models at 3, 4 and 6 bits the KL is least between 0.3 and 1 (docs/benchmarks.md)."""

Rows = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class _Seen:
    """What calibration saw of a table: statistics, samples as `linears.record` takes them, how often each row came."""

    stats: LinearStats | None = None
    sample: Tensor | None = None
    reference: Tensor | None = None
    counts: Tensor | None = None


def before_blocks(job: Job, staging: Staging, workers: Workers, progress: Progress) -> Rows | None:
    """Quantises the embedding unless the journal holds it; what gives its rows as they are then, None if it stays."""
    spec = next((spec for spec in job.tables if spec.weight == job.skeleton.embedding), None)
    if spec is None:
        return None
    if not holds(staging, EMBEDDING):
        progress.begin("quantising the embedding", 1)
        seen = _Seen()
        if job.needs_blocks:
            seen = _seen_of_embedding(job, spec, workers)
        _commit(job, staging, EMBEDDING, spec, seen, workers)
        progress.advance(spec.name)
        progress.end()
    entry = next(entry for entry in staging.journal() if entry["key"] == EMBEDDING)
    return rows_of(job, spec, staging.read_state(entry["part"]))


def rows_of(job: Job, spec: LinearSpec, stored: Mapping[str, Tensor]) -> Rows:
    """What gives rows of a finished table, from all that was written of it, by name."""
    local = {part: stored[f"{spec.name}.{part}"] for part in layouts.PARTS if f"{spec.name}.{part}" in stored}
    scheme = job.integers(spec)
    return lambda rows: decode_rows(local, scheme, rows)


def head_follows(job: Job, staging: Staging) -> bool:
    """Whether a head of its own is still to be quantised."""
    return any(spec.weight != job.skeleton.embedding for spec in job.tables) and not holds(staging, HEAD)


def behind_blocks(
    job: Job, staging: Staging, leaving: Activations | None, workers: Workers, progress: Progress
) -> None:
    """Quantises a head of its own. leaving: behind the last block, None for methods that run none."""
    spec = job.tables[-1]
    progress.begin("quantising the head", 1)
    seen = _Seen()
    if leaving is not None:
        chunks = [entering_head(job.skeleton, hidden).flatten(0, -2) for hidden in leaving.quantized]
        originals = {p: entering_head(job.skeleton, x).flatten(0, -2) for p, x in leaving.original.items()}
        pairs = [chunks[place] for place in sorted(originals)] or chunks
        reference = sample_of([originals[place] for place in sorted(originals)]) if originals else None
        seen = _Seen(collect(chunks, originals, workers.pool), sample_of(pairs), reference)
    _commit(job, staging, HEAD, spec, seen, workers)
    progress.advance(spec.name)
    progress.end()


def _seen_of_embedding(job: Job, spec: LinearSpec, workers: Workers) -> _Seen:
    """Tokens of the calibration text; of a tied table also what enters the head of the original model."""
    assert job.calibration is not None
    counts = torch.bincount(job.calibration.tokens.flatten(), minlength=spec.out_features).float()
    if not is_tied(job.skeleton) or not job.stage.method.calibrated:
        return _Seen(counts=counts)
    at = compared(job.skeleton, job.calibration.tokens)
    for block in range(job.skeleton.num_blocks):
        module = job.skeleton.materialise(block)
        at = at.advanced(list(workers.pool.map(lambda run: run(), at.runs(job.skeleton, module))))
        job.skeleton.release(module)
    chunks = [entering_head(job.skeleton, hidden).flatten(0, -2) for hidden in at.quantized]
    return _Seen(collect(chunks, {}, workers.pool), sample_of(chunks), counts=counts)


def _settings(job: Job, spec: LinearSpec) -> RtnConfig | GptqConfig:
    """What rounds a table: GPTQ where text was read for it, else what the recipe rounds to nearest with."""
    if job.stage.method.calibrated and (is_tied(job.skeleton) or spec.weight != job.skeleton.embedding):
        found = job.rounding if isinstance(job.rounding, GptqConfig) else GptqConfig.model_validate({})
        found = found.model_copy(update={"sparsity": None, "pattern": None})
        return found.model_copy(update={"damp_frac": TIED_DAMPING}) if is_tied(job.skeleton) else found
    return job.stage.method if isinstance(job.stage.method, RtnConfig) else RtnConfig(scale_search=True)


def _commit(job: Job, staging: Staging, key: str, spec: LinearSpec, seen: _Seen, workers: Workers) -> None:
    settings = _settings(job, spec)
    shared = None
    if isinstance(settings, GptqConfig):
        assert seen.stats is not None
        shared = gptq.Preconditioner(seen.stats, settings, workers.pool)
    measured = TableError(seen.sample, seen.reference, seen.counts)
    slabs = []
    for start in range(0, spec.out_features, ROWS_AT_A_TIME):
        weight = job.checkpoint.read_rows(spec.weight, slice(start, start + ROWS_AT_A_TIME)).float()
        if not torch.isfinite(weight).all():
            raise WorkError(f"{spec.weight} holds NaN or infinite values", "restore the checkpoint from its source")
        found = _rounded(job, spec, weight, settings, shared, workers)
        measured.add(start, weight, found.dequantize().float())
        slabs.append(job.format.pack(found, None))
    tensors = {f"{spec.name}.{part}": torch.cat([slab[part] for slab in slabs]) for part in slabs[0]}
    tensors[f"{spec.name}.weight_shape"] = torch.tensor([spec.out_features, spec.in_features])
    fate: Fate = {spec.weight: ("quantized", list(tensors))}
    if key == EMBEDDING:
        fate |= {alias: ("tied", list(tensors)) for alias in aliases(job.skeleton)}
    record, fallbacks = _report(job, spec, settings, shared, measured)
    commit(job, staging, key, tensors, fate, [record], fallbacks)


def _rounded(
    job: Job,
    spec: LinearSpec,
    weight: Tensor,
    settings: RtnConfig | GptqConfig,
    shared: gptq.Preconditioner | None,
    workers: Workers,
) -> QuantizedTensor:
    scheme, dtype = job.integers(spec), job.scale_dtype(spec)
    if isinstance(settings, GptqConfig) and shared is not None and shared.factored is not None:
        shared.prepare(scheme.groups(spec.in_features), workers.pool)
        weight = shared.corrected(weight, workers.pool)
        return in_tiles(weight, lambda rows: gptq.transform(rows, shared, scheme, settings, dtype), workers.pool)
    plain = settings if isinstance(settings, RtnConfig) else RtnConfig(scale_search=True)
    return in_tiles(weight, lambda rows: rtn.transform(rows, scheme, plain, dtype), workers.pool)


def _report(
    job: Job,
    spec: LinearSpec,
    settings: RtnConfig | GptqConfig,
    shared: gptq.Preconditioner | None,
    measured: TableError,
) -> tuple[LayerRecord, list[Fallback]]:
    details: dict[str, Any] = {}
    fallbacks = []
    if shared is not None and shared.factored is None:
        fallbacks = [Fallback(name=spec.name, action="rtn", reason="no damping makes its Hessian positive definite")]
    elif shared is not None and shared.factored is not None:
        damp_frac = shared.factored.damp_frac
        corrected = shared.correction is not None
        details = {"damp_frac": damp_frac, "tokens": shared.stats.tokens, "corrected": corrected}
        if damp_frac > settings.damp_frac:  # type: ignore[union-attr]
            said = f"the Hessian needed damping {damp_frac:g}"
            fallbacks = [Fallback(name=spec.name, action="damping raised", reason=said)]
    if spec.weight == job.skeleton.embedding:
        details |= {"lookup_error": measured.lookups, "tied": is_tied(job.skeleton)}
    is_head = spec.weight != job.skeleton.embedding or is_tied(job.skeleton)
    return (
        LayerRecord(
            name=spec.name,
            block=None,
            method=settings.kind,
            scheme=job.schemes[spec.name].label,
            bits_per_weight=job.stored_bits(spec) / (spec.in_features * spec.out_features),
            output_error=measured.outputs if is_head else measured.lookups,
            weight_sqnr_db=measured.sqnr_db,
            fallback=fallbacks[0].action if fallbacks else None,
            details=details,
        ),
        fallbacks,
    )

"""`bench`: load a model, or two to compare, and measure what they cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from compress.content import default_model
from compress.errors import UserError
from compress.evaluation.costs.measure import Settings, measure, measure_pair
from compress.evaluation.costs.prices import PriceTable, load_prices
from compress.evaluation.costs.record import CostRecord
from compress.evaluation.costs.workload import cache_tokens
from compress.evaluation.identity import environment_record, model_record
from compress.evaluation.records import EnvironmentRecord, ModelRecord
from compress.models.checkpoint import Checkpoint
from compress.progress import Progress
from compress.runtime.loading import load
from compress.runtime.protocol import Runtime
from compress.runtime.sound import check_artifact
from compress.runtime.text_model import TextModel
from compress.workflows.drafts import Worth, open_draft, worth

ENGINES = {"auto": None, "transformers": "reference"}
"""What runs a baseline -> its kernel; None: that of the candidate."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What was measured: the model and its cost, the same of the baseline and the draft's worth if there were any, and
    on what."""

    model: ModelRecord
    cost: CostRecord
    baseline: ModelRecord | None
    cost_baseline: CostRecord | None
    environment: EnvironmentRecord
    draft: Worth | None = None


def bench(
    model: str | Path | None = None,
    baseline: str | Path | None = None,
    *,
    baseline_engine: str = "auto",
    draft: str | Path | None = None,
    draft_tokens: int = 4,
    prices: str | Path | None = None,
    settings: Settings | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> Bench:
    """Measures a model directory or an artifact (the packaged model if None), with a baseline in turns.

    baseline_engine: `transformers`, as people run a model without this project (`auto` for dtype is then that of its
    files), or `auto`, the candidate's kernel.
    draft: a model that proposes `draft_tokens` tokens at a time; its worth is measured on held-out prompts, first.
    prices: a price table's file; the shipped examples if None.

    Raises:
        UserError: no such model or engine, a price table that cannot be read, settings that do not fit the model.
        IntegrityError: damaged files, an artifact that was changed, a baseline with another tokenizer.
        WorkError: out of memory.
    """
    settings = replace(settings or Settings(), baseline_kernel=_kernel(baseline, baseline_engine))
    if settings.seconds is not None and not settings.seconds > 0:
        raise UserError(f"max_seconds is {settings.seconds}; it must be above 0", "300 is enough for a small model")
    room = cache_tokens(settings.prompt_tokens, settings.new_tokens, settings.batch_sizes)
    table: PriceTable = load_prices(prices)
    path = default_model() if model is None else model
    candidate = _open(path, device, dtype, settings.kernel, room, settings.kv_cache, settings.deterministic)
    found = None
    if draft is not None:
        target = cast(TextModel, candidate)
        opened = open_draft(draft, target, device=device, kernel=settings.kernel)
        found = worth(target, opened, draft_tokens, progress=progress)
    if baseline is None:
        cost = measure(candidate, table, settings, progress=progress)
        return Bench(model_record(candidate), cost, None, None, environment_record(candidate), found)
    if baseline_engine == "transformers" and dtype == "auto":
        dtype = _stored_dtype(baseline)
    reference = _open(baseline, device, dtype, settings.baseline_kernel or settings.kernel, room)
    cost, other = measure_pair(candidate, reference, table, settings, progress=progress)
    return Bench(model_record(candidate), cost, model_record(reference), other, environment_record(candidate), found)


def _kernel(baseline: str | Path | None, engine: str) -> str | None:
    if engine not in ENGINES:
        raise UserError(f"baseline engine {engine!r} is not known", f"choose {' or '.join(ENGINES)}")
    if engine != "auto" and baseline is None:
        raise UserError(f"--baseline-engine {engine} without a baseline", "name the plain model with --baseline")
    return ENGINES[engine]


def _stored_dtype(model: str | Path) -> str:
    config = Checkpoint.open(model).config
    found = str(config.get("dtype") or config.get("torch_dtype"))
    return found if found in ("float32", "bfloat16", "float16") else "auto"


def _open(
    model: str | Path,
    device: str,
    dtype: str,
    kernel: str,
    room: int | None,
    kv_cache: str = "auto",
    deterministic: bool = False,
) -> Runtime:
    check_artifact(model, scores=False)
    return load(
        model, device, dtype, kernel, cache_tokens=room, kv_cache=kv_cache, deterministic=deterministic
    )  # fmt: skip

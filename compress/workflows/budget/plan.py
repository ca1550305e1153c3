"""What a search would do and cost, without measuring anything."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from compress.pipeline.duration import on_all_threads, product_rate, rounding_rate
from compress.pipeline.memory import largest_block
from compress.pipeline.plan import Plan, plan
from compress.recipe import Recipe
from compress.workflows.budget.losses import anchors
from compress.workflows.budget.measured import LEARNING_WINDOWS, Search
from compress.workflows.budget.recipes import chosen_recipe
from compress.workflows.budget.room import allowed_bits, file_bytes
from compress.workflows.budget.search import MOST_TRIES
from compress.workflows.budget.target import Target


@dataclass(frozen=True, slots=True)
class BudgetPlan:
    """What would be measured and made. Sizes and bits are those between which a target can lie.

    measurements: KL measurements in all; known: those of an earlier search that would be taken up. runs: at most so
    many artifacts are made. seconds and memory are of the whole search.
    """

    model: str
    method: str
    target: str
    units: int
    linears: int
    options: list[str]
    measurements: int
    known: int
    runs: int
    lowest_bits_per_weight: float
    highest_bits_per_weight: float
    lowest_bytes: int
    highest_bytes: int
    source_bytes: int
    peak_memory_bytes: int
    seconds_estimate: float
    directory: Path


def plan_budget(search: Search, target: Target) -> BudgetPlan:
    """Lays a search out. Raises UserError for a budget that cannot be met, as the search itself does."""
    if target.kind != "kl":
        allowed_bits(target, search.job, search.units)
    units, job = search.units, search.job
    known = search.known()
    missing = [unit for unit in units if unit.name not in known]
    least, most = (sum(pick(unit.bits) for unit in units) for pick in (min, max))
    weights = sum(unit.weights for unit in units)
    usual = plan(_middling(search), model=None, output=None)
    assert isinstance(usual, Plan)
    runs = MOST_TRIES + 1 if target.kind == "kl" else 1
    return BudgetPlan(
        model=job.model_name,
        method=job.method_name,
        target=target.text,
        units=len(units),
        linears=sum(len(unit.linears) for unit in units),
        options=list(dict.fromkeys(option.label for unit in units for option in unit.options)),
        measurements=sum(len(anchors(unit)) for unit in units),
        known=sum(len(anchors(unit)) for unit in units if unit.name in known),
        runs=runs,
        lowest_bits_per_weight=least / weights,
        highest_bits_per_weight=most / weights,
        lowest_bytes=file_bytes(job, units, least),
        highest_bytes=file_bytes(job, units, most),
        source_bytes=job.checkpoint.nbytes,
        peak_memory_bytes=max(usual.peak_memory_bytes, _memory(search) if missing else 0),
        seconds_estimate=runs * usual.seconds_estimate
        + on_all_threads(lambda: _seconds(search, {u.name for u in missing})),
        directory=search.directory,
    )


def _middling(search: Search) -> Recipe:
    """A recipe whose run costs about what the chosen one's will: the option in the middle for every unit."""
    choice = [unit.options[len(unit.options) // 2] for unit in search.units]
    return chosen_recipe(search.job.recipe, search.units, choice)


def _seconds(search: Search, missing: set[str]) -> float:
    """Of the measurements, on one thread."""
    skeleton = search.job.skeleton
    per_block = [0.0] * skeleton.num_blocks
    for spec in skeleton.linears():
        per_block[spec.block] += 2.0 * spec.in_features * spec.out_features
    width = skeleton.linears()[0].in_features
    head = 2.0 * skeleton.vocabulary * width
    learning = min(LEARNING_WINDOWS, search.learning.tokens.shape[0]) * search.learning.tokens.shape[1]
    work = (search.measuring.numel() * (sum(per_block) + head) + learning * sum(per_block)) if missing else 0.0
    rates = {option: rounding_rate(search.job, option) for unit in search.units for option in unit.options}
    rounding = 0.0
    for unit in (unit for unit in search.units if unit.name in missing):
        work += len(anchors(unit)) * search.measuring.numel() * (sum(per_block[max(unit.block, 0) :]) + head)
        for spec in unit.linears:
            work += learning * spec.in_features**2
            work += len(unit.options) * 6.0 * spec.out_features * spec.in_features**2
            rounding += spec.out_features * spec.in_features * sum(rates[option] for option in unit.options)
    return work * product_rate() + rounding


def _memory(search: Search) -> int:
    """Of the measurements: the model in float32, one block more per thread, and of the measuring text the states
    before every block and the log-probabilities, three times while two are compared."""
    job, tokens = search.job, search.measuring.numel()
    index, threads = job.checkpoint.index, torch.get_num_threads()
    inside = sum(
        math.prod(index[n].shape) for b in range(job.skeleton.num_blocks) for n in job.skeleton.block_tensors(b)
    )
    states = tokens * (job.skeleton.num_blocks + 2) * job.skeleton.linears()[0].in_features
    logits = tokens * job.skeleton.vocabulary
    kept = max(unit.weights for unit in search.units)
    return 4 * (inside + (largest_block(job) + 2 * logits) * threads + states + logits + 3 * kept)

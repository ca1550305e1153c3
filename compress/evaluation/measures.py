"""Each kind of gate as a number with one-sided bounds and a limit. Free of torch; nothing here decides.

A measure that its data does not contain raises IntegrityError, so a gate can never pass for lack of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from compress.errors import IntegrityError
from compress.evaluation import statistics
from compress.evaluation.policy import GateSpec, KlMean, KlP999, PplRatio, SizeRatio
from compress.evaluation.records import KL_THRESHOLDS, BlockSums, KlPercentiles, ModelRecord

TAIL = 0.001

Needed = TypeVar("Needed")


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is measured: two models and the sums of the candidate against the baseline, block by block."""

    candidate: ModelRecord
    baseline: ModelRecord
    blocks: BlockSums
    nll_baseline: Sequence[float]
    kl_percentiles: KlPercentiles | None = None


@dataclass(frozen=True, slots=True)
class Measure:
    """An estimate, its lower and upper bound at level 1 - alpha each, and the limit it is held against.

    `high` None: no upper bound is known. `below`: whether it has to be at or below the limit, else at or above.
    """

    estimate: float
    low: float
    high: float | None
    limit: float
    below: bool


def measure(gate: GateSpec, comparison: Comparison, alpha: float) -> Measure:
    """Measures what `gate` is about. Raises IntegrityError if the comparison lacks the sums it needs."""
    blocks, level = comparison.blocks, 1 - 2 * alpha
    if isinstance(gate, SizeRatio):
        ratio = comparison.baseline.weights_bytes / comparison.candidate.weights_bytes
        return Measure(ratio, ratio, ratio, gate.min, below=False)
    if isinstance(gate, PplRatio):
        found = statistics.perplexity_ratio(blocks.nll, comparison.nll_baseline, blocks.tokens, level)
        return Measure(found.estimate - 1, found.low - 1, found.high - 1, gate.max_increase, below=True)
    if isinstance(gate, KlMean):
        found = statistics.ratio(_needed(blocks.kl, gate), blocks.tokens, level)
        return Measure(found.estimate, found.low, found.high, gate.max, below=True)
    if isinstance(gate, KlP999):
        estimate = _needed(comparison.kl_percentiles, gate).p999
        low, high = _tail(_needed(blocks.kl_above, gate), blocks.tokens, alpha)
        return Measure(estimate, low, high, gate.max, below=True)
    found = statistics.ratio(_needed(blocks.top1_agree, gate), blocks.tokens, level)
    return Measure(found.estimate, found.low, found.high, gate.min, below=False)


def _tail(above: Sequence[Sequence[int]], tokens: Sequence[int], alpha: float) -> tuple[float, float | None]:
    """Thresholds between which p99.9 of KL lies: it is above one if surely more than 0.1% of the tokens are."""
    low, high = 0.0, None
    for index, threshold in reversed(list(enumerate(KL_THRESHOLDS))):
        counts = [row[index] for row in above]
        lower, upper = statistics.share_bounds(counts, tokens, alpha)
        if upper <= TAIL:
            high = threshold
        if lower > TAIL:
            low = threshold
            break
    return low, high


def _needed(value: Needed | None, gate: GateSpec) -> Needed:
    if value is None:
        raise IntegrityError(
            f"gate {gate.id} ({gate.kind}) needs the candidate scored in lock-step with the baseline; the record was "
            "scored alone",
            "run `compress eval CANDIDATE --baseline BASELINE`, or give the gate the two models",
        )
    return value

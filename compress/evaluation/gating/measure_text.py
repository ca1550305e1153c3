"""What gates on a text measure: perplexity, KL, agreement, and the probability of the correct token.

All are ratios of sums over clusters (see `compress.evaluation.statistics`); shares of tokens also take the binomial
bound, because clusters without a single hit show no variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from compress.errors import IntegrityError
from compress.evaluation import statistics
from compress.evaluation.gating.comparison import Comparison, PairedText
from compress.evaluation.gating.kinds import (
    DpRms,
    DpTail,
    KlIncrease,
    KlMean,
    KlP999,
    PplRatio,
    TextGate,
    Top1Agreement,
)
from compress.evaluation.measures import Bounds, Measure, exactly
from compress.evaluation.records import KL_THRESHOLDS

TAIL = 0.001
SMALLEST_BCA = 0.002

Transform = Callable[[float], float]


def measure(gate: TextGate, text: PairedText, comparison: Comparison, seed: int) -> Measure:
    """The measure of a gate on a text. Raises IntegrityError where the sums it needs were not recorded."""
    sums, what = text.clusters, f"gate {gate.id} ({gate.kind})"  # type: ignore[attr-defined]
    name, tokens = text.data.name, sums.tokens

    def made(estimate: float, bounds: Bounds, limit: float, below: bool, unit: str, *, exact: bool = False) -> Measure:
        return Measure(estimate, bounds, limit, below, unit, subject=name, exact=exact, size=sum(tokens))

    if isinstance(gate, PplRatio):
        loss = np.asarray(sums.nll) - np.asarray(text.nll_baseline)
        found = _ratio(gate.interval, loss.tolist(), tokens, seed, _increase)
        return made(*found, gate.max_increase, True, "share")
    if isinstance(gate, KlMean):
        found = _ratio(gate.interval, comparison.needed(_own(sums.kl, comparison), what), tokens, seed)
        return made(*found, gate.max, True, "nats")
    if isinstance(gate, KlIncrease):
        ours, theirs = _common_kl(text, comparison, gate)
        found = _ratio(gate.interval, ours, theirs, seed, lambda ratio: ratio - 1)
        return made(*found, gate.max_increase, True, "share")
    if isinstance(gate, KlP999):
        estimate = comparison.needed(text.percentiles, what).p999
        above = comparison.needed(sums.kl_above, what)
        return made(estimate, lambda alpha: _tail(above, tokens, alpha), gate.max, True, "nats")
    if isinstance(gate, Top1Agreement):
        agreed = comparison.needed(sums.confident_agree if gate.confident else sums.top1_agree, what)
        counted = comparison.needed(sums.confident, what) if gate.confident else tokens
        estimate = sum(agreed) / sum(counted) if any(counted) else math.nan
        return made(estimate, _share(agreed, counted), gate.min, False, "share")
    if isinstance(gate, DpRms):
        found = _ratio(gate.interval, comparison.needed(sums.dp2, what), tokens, seed, _root)
        return made(*found, gate.max, True, "probability")
    if isinstance(gate, DpTail):
        tail = comparison.needed(text.summary.dp_percentiles, what)
        lost = max(0.0, -(tail.p01 if gate.percentile == "1%" else tail.p001))
        return made(lost, exactly(lost), gate.max_drop, True, "probability", exact=True)
    raise AssertionError(f"no measure for {type(gate).__name__}")


def _ratio(
    interval: str,
    numerators: Sequence[float],
    denominators: Sequence[float],
    seed: int,
    transform: Transform = lambda ratio: ratio,
) -> tuple[float, Bounds]:
    """Estimate and bounds of an increasing function of a ratio of sums."""

    def bounds(alpha: float) -> tuple[float, float]:
        level = 1 - 2 * alpha
        if interval == "bca":
            if alpha < SMALLEST_BCA:  # ten thousand resamples do not tell such tails
                return -math.inf, math.inf
            found = statistics.bca_ratio(numerators, denominators, level, seed)
        else:
            found = statistics.ratio(numerators, denominators, level)
        return transform(found.low), transform(found.high)

    return transform(statistics.ratio(numerators, denominators).estimate), bounds


def _share(counts: Sequence[int], tokens: Sequence[int]) -> Bounds:
    """Bounds of a share of tokens; none where they all lie in one cluster."""
    if sum(count > 0 for count in tokens) < 2:
        return lambda _: (0.0, 1.0)
    return lambda alpha: statistics.share_bounds(counts, tokens, alpha)


def _increase(log_ratio: float) -> float:
    return math.expm1(min(log_ratio, statistics.MAX_EXPONENT))


def _root(square: float) -> float:
    return math.sqrt(max(square, 0.0))


def _tail(above: Sequence[Sequence[int]], tokens: Sequence[int], alpha: float) -> tuple[float, float]:
    """Thresholds between which p99.9 of KL lies: it is above one if surely more than 0.1% of the tokens are."""
    low, high = 0.0, math.inf
    for index, threshold in reversed(list(enumerate(KL_THRESHOLDS))):
        counts = [row[index] for row in above]
        lower, upper = statistics.share_bounds(counts, tokens, alpha)
        if upper <= TAIL:
            high = threshold
        if lower > TAIL:
            low = threshold
            break
    return low, high


def _own(kl: list[float] | None, comparison: Comparison) -> list[float] | None:
    """The candidate's KL to this baseline; what a record of another baseline holds is not that."""
    return kl if comparison.alone is None else None


def _common_kl(text: PairedText, comparison: Comparison, gate: KlIncrease) -> tuple[list[float], list[float]]:
    if text.clusters.kl is None or text.kl_baseline is None:
        raise IntegrityError(
            f"gate {gate.id} (kl_increase) needs {comparison.candidate.name} and {comparison.baseline.name} scored "
            "against one and the same model",
            "give as that baseline the eval.json of an earlier release that was scored against the model which "
            "this candidate was made from",
        )
    return text.clusters.kl, text.kl_baseline

"""Sums per cluster of one scored text, and what they say: means, ratios and their 95% intervals. Free of torch."""

from __future__ import annotations

import math
from typing import TypeVar

from pydantic import model_validator

from compress.evaluation import statistics
from compress.evaluation.record_base import Count, IntervalRecord, Positive, _Record

T = TypeVar("T")

KL_THRESHOLDS: tuple[float, ...] = (
    *(float(f"{digit}e{power}") for power in range(-3, 1) for digit in (1, 1.5, 2, 3, 5, 7)),
    10.0,
)
"""KL values (nats) for which each cluster counts the tokens above: bounds for percentiles come from these counts."""


class ClusterSums(_Record):
    """Per cluster of tokens, in order: column lists of equal length. The optional ones need a baseline.

    Sums: tokens scored, UTF-8 bytes of their text, nll and nll_baseline (nats), kl = KL(baseline || candidate) (nats),
    dp and dp2 = the change p_candidate - p_baseline of the correct token's probability and its square, tokens whose
    likeliest token agrees; the same where the baseline is confident (p > 0.5); tokens with KL above each of
    `KL_THRESHOLDS`.
    """

    tokens: list[Positive]
    text_bytes: list[Count]
    nll: list[float]
    nll_baseline: list[float] | None = None
    kl: list[float] | None = None
    dp: list[float] | None = None
    dp2: list[float] | None = None
    top1_agree: list[Count] | None = None
    confident: list[Count] | None = None
    confident_agree: list[Count] | None = None
    kl_above: list[list[Count]] | None = None

    @model_validator(mode="after")
    def _columns_fit(self) -> ClusterSums:
        own = (self.text_bytes, self.nll)
        counts = (self.top1_agree, self.confident, self.confident_agree, self.kl_above)
        paired = (self.nll_baseline, self.kl, self.dp, self.dp2, *counts)
        present = [column for column in paired if column is not None]
        if present and len(present) != len(paired):
            raise ValueError("some of the baseline's columns are missing")
        if any(len(column) != len(self.tokens) for column in (*own, *present)):
            raise ValueError("columns of different length")
        if any(len(row) != len(KL_THRESHOLDS) for row in self.kl_above or ()):
            raise ValueError(f"kl_above needs {len(KL_THRESHOLDS)} counts per cluster")
        if sum(self.text_bytes) == 0:
            raise ValueError("the scored tokens have no text")
        return self


class KlPercentiles(_Record):
    """KL per token in nats: median, 90%, 99%, 99.9% and largest."""

    p50: float
    p90: float
    p99: float
    p999: float
    max: float


class DpPercentiles(_Record):
    """Change of the correct token's probability: 0.1%, 1%, 50%, 99% and 99.9%. A heavier lower tail is damage."""

    p001: float
    p01: float
    p50: float
    p99: float
    p999: float


class Summary(_Record):
    """What the sums say, with 95% intervals over clusters. All but `perplexity` and `bits_per_byte` need a baseline.

    `bits_per_byte` is the code length per UTF-8 byte of text, comparable between tokenizers; `dp_rms` the root of the
    mean square of the change of the correct token's probability.
    """

    perplexity: IntervalRecord
    bits_per_byte: IntervalRecord
    perplexity_baseline: IntervalRecord | None = None
    perplexity_ratio: IntervalRecord | None = None
    kl_mean: IntervalRecord | None = None
    kl_percentiles: KlPercentiles | None = None
    top1_agreement: IntervalRecord | None = None
    top1_agreement_confident: IntervalRecord | None = None
    dp_mean: IntervalRecord | None = None
    dp_rms: float | None = None
    dp_percentiles: DpPercentiles | None = None


def summarise(clusters: ClusterSums, kl: KlPercentiles | None = None, dp: DpPercentiles | None = None) -> Summary:
    """The summary of a text's sums; the percentiles, which no sums give, are passed through."""
    tokens = clusters.tokens
    perplexity = IntervalRecord.of(statistics.perplexity(clusters.nll, tokens))
    bits = [value / math.log(2) for value in clusters.nll]
    bits_per_byte = IntervalRecord.of(statistics.ratio(bits, clusters.text_bytes))
    if clusters.nll_baseline is None:
        return Summary(perplexity=perplexity, bits_per_byte=bits_per_byte)
    kl_sums, dp_sums, dp2_sums = _there(clusters.kl), _there(clusters.dp), _there(clusters.dp2)
    agree, sure, sure_agree = _there(clusters.top1_agree), _there(clusters.confident), _there(clusters.confident_agree)
    several = sum(count > 0 for count in sure) > 1  # an interval needs two clusters
    confident = _share(sure_agree, sure) if several else None
    return Summary(
        perplexity=perplexity,
        bits_per_byte=bits_per_byte,
        perplexity_baseline=IntervalRecord.of(statistics.perplexity(clusters.nll_baseline, tokens)),
        perplexity_ratio=IntervalRecord.of(statistics.perplexity_ratio(clusters.nll, clusters.nll_baseline, tokens)),
        kl_mean=IntervalRecord.of(statistics.ratio(kl_sums, tokens)),
        kl_percentiles=kl,
        top1_agreement=_share(agree, tokens),
        top1_agreement_confident=confident,
        dp_mean=IntervalRecord.of(statistics.ratio(dp_sums, tokens)),
        dp_rms=math.sqrt(math.fsum(dp2_sums) / sum(tokens)),
        dp_percentiles=dp,
    )


def _share(counts: list[int], tokens: list[int]) -> IntervalRecord:
    """A share of tokens with the bounds that gates take: clusters without a single miss show no variance."""
    low, high = statistics.share_bounds(counts, tokens, (1 - statistics.LEVEL) / 2)
    return IntervalRecord(estimate=sum(counts) / sum(tokens), low=low, high=high, level=statistics.LEVEL)


def _there(column: list[T] | None) -> list[T]:
    """The column of a text that has a baseline; the validator of `ClusterSums` saw that it is there."""
    assert column is not None
    return column


def same_summary(stated: Summary, derived: Summary) -> bool:
    """Equal but for the last digits, which may differ from one machine's arithmetic to another's."""
    for name in Summary.model_fields:
        left, right = getattr(stated, name), getattr(derived, name)
        if (left is None) != (right is None):
            return False
        if isinstance(left, IntervalRecord) and not all(
            _close(getattr(left, field), getattr(right, field)) for field in IntervalRecord.model_fields
        ):
            return False
        if isinstance(left, float) and not _close(left, right):
            return False
    return True


def _close(left: float, right: float) -> bool:
    return math.isclose(left, right, rel_tol=1e-9, abs_tol=1e-12)

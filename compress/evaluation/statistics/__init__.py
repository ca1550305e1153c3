"""Intervals, tests and sample sizes of evaluation. Free of torch; numpy at import, scipy where it is needed.

All intervals are two-sided at `level`; each end is also a one-sided bound at (1 + level) / 2, which is what the gate
uses. What each covers is measured in tests/evaluation/test_statistics_coverage.py and test_statistics_paired.py.
"""

from compress.evaluation.statistics.accuracy import chance_corrected_recovery, errors_above_chance, wilson
from compress.evaluation.statistics.bca import bca_at, bca_ratio
from compress.evaluation.statistics.interval import LEVEL, MAX_EXPONENT, Interval, hull, t_quantile
from compress.evaluation.statistics.multiplicity import holm
from compress.evaluation.statistics.paired import (
    Pairs,
    agresti_min,
    by_cluster,
    clustered_difference,
    mcnemar,
    mcnemar_midp,
    paired_difference,
    pairs_of,
    tango,
)
from compress.evaluation.statistics.power import items_needed, smallest_drop, tokens_needed
from compress.evaluation.statistics.ratios import (
    mean_difference,
    perplexity,
    perplexity_ratio,
    ratio,
    ratio_error,
    share_bounds,
)
from compress.evaluation.statistics.sequential import spent_alpha

__all__ = [
    "LEVEL",
    "MAX_EXPONENT",
    "Interval",
    "Pairs",
    "agresti_min",
    "bca_at",
    "bca_ratio",
    "by_cluster",
    "chance_corrected_recovery",
    "clustered_difference",
    "errors_above_chance",
    "holm",
    "hull",
    "items_needed",
    "mcnemar",
    "mcnemar_midp",
    "mean_difference",
    "paired_difference",
    "pairs_of",
    "perplexity",
    "perplexity_ratio",
    "ratio",
    "ratio_error",
    "share_bounds",
    "smallest_drop",
    "spent_alpha",
    "t_quantile",
    "tango",
    "tokens_needed",
    "wilson",
]

"""Populations of clusters whose truth is known, to see what intervals cover.

Measured with the packaged model rounded to 4 and 3 bits: the mean KL of documents varies by 0.09 (standard deviation of
its logarithm), that of 2,048-token blocks by 0.07 to 0.08; log perplexity ratios of documents by some 0.008, on top of
0.3 to 0.5 per root of the tokens. The populations here are as wide, and twice as wide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.evaluation.statistics import Interval

Column = NDArray[np.float64]

# Words per article of WikiText-2's test set: 26 to 14,299, worth 36 articles of equal length.
ARTICLES = np.array(
    [
        *(1091, 4749, 2432, 7102, 2023, 2423, 10257, 2248, 10760, 1743, 2964, 7571, 923, 2187, 461, 1719, 6657, 1042),
        *(3902, 3582, 4424, 1349, 3753, 10683, 1942, 6679, 10505, 1283, 26, 247, 4496, 1472, 6050, 1707, 8849, 7318),
        *(1602, 14299, 4128, 9325, 10547, 2232, 1117, 5128, 2291, 1029, 1320, 6377, 1250, 1554, 2663, 2680, 964, 1005),
        *(1017, 909, 6775, 483, 3085, 5361, 3974, 3477),
    ],
    dtype=np.float64,
)
BLOCKS = np.array([2044.0] * 41 + [1229.0])  # the packaged text


@dataclass(frozen=True)
class Population:
    """draw(random, sizes) gives the sums of one sample of clusters; their expected ratio to the sizes is `truth`."""

    truth: float
    draw: Callable[[np.random.Generator, Column], Column]


def log_ratios(truth: float, *, heavy: bool = False) -> Population:
    """Sums of log perplexity ratios: documents differ by 0.008, normal or with the tails of Student's t5."""

    def draw(random: np.random.Generator, sizes: Column) -> Column:
        effect = random.standard_t(5, len(sizes)) if heavy else random.normal(size=len(sizes))
        return sizes * (truth + 0.008 * effect) + 0.4 * np.sqrt(sizes) * random.normal(size=len(sizes))

    return Population(truth, draw)


def kl_sums(truth: float, spread: float) -> Population:
    """Sums of KL: documents differ by a lognormal factor, tokens by a gamma one, so both lean to the right."""

    def draw(random: np.random.Generator, sizes: Column) -> Column:
        factor = random.lognormal(-(spread**2) / 2, spread, len(sizes))
        return sizes * truth * factor * random.gamma(sizes / 30, 30 / sizes)

    return Population(truth, draw)


@dataclass
class Coverage:
    """How often the truth lies inside, at or above the lower bound, at or below the upper bound."""

    inside: float = 0.0
    low: float = 0.0
    high: float = 0.0


def coverage(
    population: Population,
    sizes: Column,
    interval: Callable[[Column, Column, float], Interval],
    runs: int,
    seed: int = 0,
    level: float = 0.95,
) -> Coverage:
    """Of a two-sided interval at `level`, and of two one-sided bounds at `level`."""
    counts = Coverage()
    for sums in samples(population, sizes, runs, seed):
        two, one = interval(sums, sizes, level), interval(sums, sizes, 2 * level - 1)
        counts.inside += (two.low <= population.truth <= two.high) / runs
        counts.low += (one.low <= population.truth) / runs
        counts.high += (population.truth <= one.high) / runs
    return counts


def samples(population: Population, sizes: Column, runs: int, seed: int) -> Iterator[Column]:
    random = np.random.default_rng(seed)
    return (population.draw(random, sizes) for _ in range(runs))


POPULATIONS = {
    "perplexity": log_ratios(math.log(1.04)),
    "perplexity, heavy tails": log_ratios(math.log(1.04), heavy=True),
    "KL": kl_sums(0.05, 0.1),
    "KL, wide": kl_sums(0.05, 0.2),
}
SIZES = {"42 blocks": BLOCKS, "62 documents": ARTICLES}

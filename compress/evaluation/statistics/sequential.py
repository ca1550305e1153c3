"""Looking several times at growing data: how much of alpha each look may spend.

Testing at 5% after a third, two thirds and all of the data is wrong in more than 5% of all runs, because each look is
another chance to err. Pocock's rule (Biometrika 64, 1977) gives all looks the same, smaller alpha. It is computed here
for any number of equally spaced looks, by the recursion of Armitage, McPherson and Rowe (J. R. Stat. Soc. A 132, 1969).
"""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from compress.errors import UserError
from compress.evaluation.statistics.interval import checked_share, normal_quantile

MAX_LOOKS = 20
REACH = 9.0
NODES = 300


def spent_alpha(alpha: float, looks: int, sides: Literal[1, 2] = 1) -> float:
    """The alpha of each of `looks` equally spaced looks that makes an overall `alpha`.

    sides: 1 for a bound on one side, as the gate's are (two-sided intervals at level 1 - 2 spent_alpha); 2 where a
    crossing of either bound counts (Pocock's own table: 0.05 gives 0.0294 for 2 looks, 0.0221 for 3).

    Raises:
        UserError: an alpha outside 0 .. 1 (one-sided: 0 .. 0.5), or looks outside 1 .. 20.
    """
    from scipy.optimize import brentq  # type: ignore[import-untyped]
    from scipy.special import ndtr  # type: ignore[import-untyped]

    checked_share(alpha, "alpha")
    if sides == 1 and alpha >= 0.5:
        raise UserError(f"a one-sided alpha of {alpha:g} is no test", "choose an alpha such as 0.05")
    if not 1 <= looks <= MAX_LOOKS:
        raise UserError(f"{looks} looks cannot be planned", f"choose 1 to {MAX_LOOKS} looks")
    if looks == 1:
        return alpha
    # Between spending all of alpha each time and dividing it evenly (Bonferroni).
    least, most = normal_quantile(1 - alpha / sides), normal_quantile(1 - alpha / sides / looks)
    bound = brentq(lambda z: crossing(z, looks, sides) - alpha, least, most, xtol=1e-10)
    return sides * float(ndtr(-bound))


def crossing(bound: float, looks: int, sides: Literal[1, 2] = 1) -> float:
    """Probability that a standardised sum of equal, independent normal steps exceeds `bound` at one of the looks.

    The density of the sum over the paths that have not crossed is carried from look to look on Gauss-Legendre nodes.
    """
    from scipy.special import ndtr

    crossed = sides * float(ndtr(-bound))
    nodes, weights = _nodes(bound, 1, sides)
    density = _normal(nodes)
    for look in range(2, looks + 1):
        limit = bound * np.sqrt(look)
        beyond = ndtr(nodes - limit) + (ndtr(-limit - nodes) if sides == 2 else 0.0)
        crossed += float((weights * density) @ beyond)
        new_nodes, new_weights = _nodes(bound, look, sides)
        density = _normal(new_nodes[:, None] - nodes[None, :]) @ (weights * density)
        nodes, weights = new_nodes, new_weights
    return crossed


def _nodes(bound: float, look: int, sides: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Nodes and weights over the sums that have not crossed at this look."""
    points, weights = _legendre()
    high = bound * np.sqrt(look)
    low = -high if sides == 2 else -REACH * np.sqrt(look)
    return (high + low) / 2 + (high - low) / 2 * points, (high - low) / 2 * weights


@functools.cache
def _legendre() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    points, weights = np.polynomial.legendre.leggauss(NODES)
    return points, weights


def _normal(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-values * values / 2) / np.sqrt(2 * np.pi)

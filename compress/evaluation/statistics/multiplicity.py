"""Many tests at once: which of them still say something."""

from __future__ import annotations

import math
from collections.abc import Mapping

from compress.errors import WorkError
from compress.evaluation.statistics.interval import checked_share


def holm(p_values: Mapping[str, float], alpha: float) -> dict[str, bool]:
    """Which hypotheses are rejected when the risk of even one false rejection may be `alpha` (Holm 1979).

    The smallest p-value is held against alpha / m, the next against alpha / (m - 1), and so on until one is not
    rejected. The result has the keys of `p_values`, in their order.

    Raises:
        WorkError: a p-value outside 0 .. 1, or NaN.
        UserError: an alpha outside 0 .. 1.
    """
    checked_share(alpha, "alpha")
    for name, p in p_values.items():
        if math.isnan(p) or not 0 <= p <= 1:
            raise WorkError(f"the p-value of {name} is {p:g}", "score the task again")
    rejected = dict.fromkeys(p_values, False)
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        if p_values[name] > alpha / (len(p_values) - rank):
            break
        rejected[name] = True
    return rejected

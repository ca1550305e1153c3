"""How far a product is from its definition."""

from __future__ import annotations

from torch import Tensor


def error_of_largest(found: Tensor, exact: Tensor) -> float:
    """The largest difference from `exact` (float64, any shape), as a share of the largest magnitude there.

    NaN or infinite where `found` holds such; the difference itself where `exact` is all zeros.
    """
    return float((found.cpu().double() - exact).abs().max()) / (float(exact.abs().max()) or 1.0)

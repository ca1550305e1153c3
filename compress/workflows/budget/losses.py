"""From what was measured of a unit to its loss under every option."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from compress.quantization.configs import GptqConfig
from compress.types import IntScheme
from compress.workflows.budget.units import Unit

ANCHOR_WIDTHS = 3
"""Of how many bit widths, from the fewest bits on, the KL is measured; finer ones follow from their output errors."""
LEAST = 1e-30


@dataclass(frozen=True)
class Measured:
    """One unit: output error under every option, and KL in nats per token under the anchors, by the option's label."""

    errors: Mapping[str, float]
    divergences: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Signal:
    """What losses are measured on and by: tokens (windows, seq) int64 for the errors and, others, for the KL.

    method: GPTQ's settings; None for round to nearest with searched scales.
    """

    learning: Tensor
    measuring: Tensor
    method: GptqConfig | None


def anchors(unit: Unit) -> list[IntScheme]:
    """The options of a unit whose KL is measured: of each of the fewest bit widths the one in the middle."""
    widths = sorted({option.bits for option in unit.options})[:ANCHOR_WIDTHS]
    of_width = [[option for option in unit.options if option.bits == width] for width in widths]
    return [options[len(options) // 2] for options in of_width]


def losses(unit: Unit, measured: Measured) -> list[float]:
    """The KL of every option of the unit, in the order of its options."""
    points = sorted((max(measured.errors[label], LEAST), max(kl, LEAST)) for label, kl in measured.divergences.items())
    return [_interpolated(points, max(measured.errors[option.label], LEAST)) for option in unit.options]


def _interpolated(points: list[tuple[float, float]], error: float) -> float:
    """On the lines through the points (error, KL) in logarithms; in proportion to the error beyond them."""
    (lowest, least), (highest, most) = points[0], points[-1]
    if error <= lowest:
        return least * error / lowest
    if error >= highest:
        return most * error / highest
    for (left, below), (right, above) in pairwise(points):
        if left < error <= right:
            share = math.log(error / left) / math.log(right / left)
            return math.exp((1 - share) * math.log(below) + share * math.log(above))
    raise AssertionError("unreachable")

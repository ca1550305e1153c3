"""Each kind of gate as a number with one-sided bounds and a limit. Free of torch; nothing here decides.

A measure that its data does not contain raises IntegrityError, so a gate can never pass for lack of an answer. What
cannot be asked on this machine, or of this baseline, is `Skipped` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from compress.evaluation.gating.comparison import Comparison
from compress.evaluation.gating.kinds import (
    AccuracyPaired,
    BitsPerWeightMax,
    BytesMax,
    Degenerate,
    Gate,
    GenerationIdentical,
    SizeRatio,
    TextGate,
)

Bounds = Callable[[float], tuple[float, float]]
"""alpha -> lower and upper bound, each at level 1 - alpha; infinite where no bound is known."""

SMALLEST_P = 1e-12


@dataclass(frozen=True, eq=False, slots=True)
class Measure:
    """An estimate, its bounds as a function of alpha, and the limit that it is held against.

    `below`: whether it has to be at or below the limit, else at or above. `part` tells several measures of one gate
    apart, `subject` is the text or task. `exact` measures have no sampling error. `size` counts what the estimate
    rests on, in `counted`; `flips` is the share of items whose answer changed. `note` goes into the message.
    """

    estimate: float
    bounds: Bounds
    limit: float
    below: bool
    unit: str
    part: str | None = None
    subject: str | None = None
    exact: bool = False
    size: int | None = None
    counted: Literal["tokens", "items", "prompts", "rounds"] = "tokens"
    flips: float | None = None
    note: str = ""

    def outside(self, alpha: float) -> bool:
        """Whether the quantity is surely beyond the limit, at level 1 - alpha."""
        low, high = self.bounds(alpha)
        return low > self.limit if self.below else high < self.limit

    def inside(self, alpha: float) -> bool:
        """Whether the quantity is surely within the limit, at level 1 - alpha."""
        low, high = self.bounds(alpha)
        return high <= self.limit if self.below else low >= self.limit

    def p_value(self) -> float | None:
        """The p-value of "the limit is kept": the smallest alpha at which the bounds say that it is not.

        Found by bisection, so it agrees with the bounds whatever they rest on. None for exact measures.
        """
        if self.exact:
            return None
        low, high = SMALLEST_P, 0.5
        if self.outside(low):
            return low
        if not self.outside(high):
            return 1.0 if self.inside(high) else high
        while high - low > 1e-3 * high:
            middle = (low * high) ** 0.5
            low, high = (low, middle) if self.outside(middle) else (middle, high)
        return high


@dataclass(frozen=True, slots=True)
class Skipped:
    """Why a gate was not measured. Never a pass."""

    reason: str
    subject: str | None = None


def exactly(value: float) -> Bounds:
    """The bounds of a quantity without sampling error."""
    return lambda _: (value, value)


def measure(gate: Gate, comparison: Comparison, *, seed: int = 0, text: str | None = None) -> list[Measure] | Skipped:
    """Measures what `gate` is about; `text` is the policy's, for gates that name none.

    Raises:
        IntegrityError: the comparison lacks what the gate needs.
        WorkError: no interval can be computed, such as from a single cluster.
    """
    from compress.evaluation.gating import measure_answers, measure_cost, measure_task, measure_text

    if isinstance(gate, TextGate):
        return [measure_text.measure(gate, comparison.text(gate.text or text), comparison, seed)]
    if isinstance(gate, AccuracyPaired):
        return measure_task.measure(gate, comparison.task(gate.task))
    if isinstance(gate, GenerationIdentical | Degenerate):
        return measure_answers.measure(gate, comparison)
    if isinstance(gate, SizeRatio | BytesMax | BitsPerWeightMax):
        return [measure_cost.size(gate, comparison)]
    return measure_cost.measure(gate, comparison)

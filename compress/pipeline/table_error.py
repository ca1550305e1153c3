"""What rounding a table costs, summed over slabs of its rows."""

from __future__ import annotations

import math

from torch import Tensor


class TableError:
    """Squared errors of a table (rows, in) and of what is made of it.

    sample: (tokens, in) that it multiplies as a head; reference: the same tokens in the original model, where they
    differ; counts: (rows,), how often each row is looked up. None where not known.
    """

    def __init__(self, sample: Tensor | None, reference: Tensor | None, counts: Tensor | None) -> None:
        self._sample, self._counts = sample, counts
        self._reference = sample if reference is None else reference
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, start: int, weight: Tensor, changed: Tensor) -> None:
        """Counts rows (n, in) float32 from `start` on, as they were and as they are."""
        noise, signal = (weight - changed).square().sum(1), weight.square().sum(1)
        self._count("weight", noise.sum(), signal.sum())
        if self._counts is not None:
            counts = self._counts[start : start + len(weight)]
            self._count("lookups", noise @ counts, signal @ counts)
        if self._sample is not None and self._reference is not None:
            wanted = self._reference @ weight.T
            self._count("outputs", (wanted - self._sample @ changed.T).square().sum(), wanted.square().sum())

    def _count(self, name: str, noise: Tensor, signal: Tensor) -> None:
        before = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = before[0] + float(noise), before[1] + float(signal)

    @property
    def outputs(self) -> float | None:
        """||Y - Y'||^2 / ||Y||^2 of the logits; None where there is no sample."""
        return self._ratio("outputs")

    @property
    def lookups(self) -> float | None:
        """The same of the rows that tokens look up."""
        return self._ratio("lookups")

    @property
    def sqnr_db(self) -> float | None:
        """10 log10(||W||^2 / ||W - W'||^2); None where nothing changed."""
        ratio = self._ratio("weight")
        return -10 * math.log10(ratio) if ratio else None

    def _ratio(self, name: str) -> float | None:
        noise, signal = self._sums.get(name, (0.0, 0.0))
        return noise / signal if signal > 0 and math.isfinite(noise) and math.isfinite(signal) else None

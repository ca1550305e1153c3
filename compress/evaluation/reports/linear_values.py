"""The values that a linear of an artifact stands for, counted: weights as decoded, scales as stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.models.checkpoint import Checkpoint
from compress.runtime.native_reader import dense_state, packed_linears, stored_parts

if TYPE_CHECKING:
    from compress.artifact.reader import Artifact

BINS = 60


@dataclass(frozen=True, slots=True)
class Counts:
    """A histogram: `counts[i]` values between `edges[i]` and `edges[i + 1]`."""

    counts: tuple[int, ...]
    edges: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class LinearValues:
    """One linear: histograms of weights and of scales, and figures of both.

    `deviation` is the standard deviation of the weights, `largest` the largest |w|; scales by their size.
    """

    name: str
    weights: Counts
    scales: Counts
    deviation: float
    largest: float
    scale_middle: float
    scale_largest: float


def read_values(artifact: Artifact, names: Sequence[str]) -> list[LinearValues]:
    """Reads and decodes these quantised linears, one at a time. Raises IntegrityError for damaged files."""
    checkpoint = Checkpoint.open(artifact.path)
    state, (format, _) = dense_state(checkpoint), packed_linears(checkpoint)
    found = []
    for name in names:
        weight = state[f"{name}.weight"][...].float().flatten()
        scale = format.scales(stored_parts(checkpoint, name, format)).abs().flatten()
        found.append(
            LinearValues(
                name,
                _counted(weight),
                _counted(scale),
                float(weight.std()),
                float(weight.abs().max()),
                float(scale.median()),
                float(scale.max()),
            )
        )
    return found


def _counted(values: Tensor) -> Counts:
    low, high = float(values.min()), float(values.max())
    if high <= low:
        room = abs(low) or 1.0
        low, high = low - room / 2, low + room / 2
    counts = torch.histc(values, BINS, low, high)
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    return Counts(tuple(int(count) for count in counts), tuple(float(edge) for edge in edges))

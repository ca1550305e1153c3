"""What training in steps sees of the calibration windows: some teach, in batches that a seed draws, others choose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from compress.errors import UserError


def split(samples: int, held_out: float) -> tuple[list[int], list[int]]:
    """The windows that teach, and the share `held_out` of them that chooses the best state; at least one.

    Raises:
        UserError: none would be left to teach.
    """
    held = max(1, round(samples * held_out))
    if held >= samples:
        raise UserError(
            f"{held} of {samples} calibration windows are held out, which leaves none to learn from", "raise --samples"
        )
    return list(range(samples - held)), list(range(samples - held, samples))


def batches(windows: Sequence[int], count: int, seed: int) -> Iterator[list[int]]:
    """Batches of so many windows without end, each window once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    left: list[int] = []
    while True:
        batch: list[int] = []
        while len(batch) < count:
            left = left or [windows[place] for place in torch.randperm(len(windows), generator=generator).tolist()]
            taken = min(count - len(batch), len(left))
            batch, left = batch + left[:taken], left[taken:]
        yield batch

"""Which items of a task are scored: a fixed order, drawn by a seed, in proportion to the task's strata.

Taking the first n of this order keeps every stratum's share at every n, and a larger n holds all of a smaller one, so
the items that ship are simply the beginning of the order. Taking the first n of a data file would not do: BLiMP and
MMLU files are sorted by subject.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def order(strata: Sequence[str], seed: int, task: str) -> list[int]:
    """All item numbers, the first to be chosen first. strata: each item's stratum; all equal: a plain shuffle."""
    keys = [hashlib.sha256(f"{seed}\n{task}\n{number}".encode()).digest() for number in range(len(strata))]
    members: dict[str, list[int]] = {}
    for number, stratum in enumerate(strata):
        members.setdefault(stratum, []).append(number)
    place: dict[int, float] = {}
    for numbers in members.values():
        for rank, number in enumerate(sorted(numbers, key=lambda n: keys[n])):
            place[number] = (rank + 0.5) / len(numbers)
    return sorted(range(len(strata)), key=lambda number: (place[number], keys[number]))


def item_id(number: int) -> str:
    """The id of an item by its place in its data file; ids sort as the places do."""
    return f"{number:06d}"

"""Which experts the calibration text reached: counted from layers.json, for the card and for reports."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class BlockCoverage:
    """The experts of one decoder block: tokens that the router sent to each, in order, and how many fell back."""

    block: int
    tokens: tuple[int, ...]
    fallbacks: int

    @property
    def median(self) -> float:
        """Tokens of the expert in the middle."""
        return statistics.median(self.tokens)


def expert_of(name: str) -> int | None:
    """The number of the expert that a linear belongs to; None of every other linear."""
    found = _EXPERT.search(name)
    return None if found is None else int(found[1])


def coverage(layers: Sequence[Mapping[str, Any]]) -> list[BlockCoverage]:
    """Per block with experts, from the rows of layers.json; empty where no tokens were counted."""
    blocks: dict[int, dict[int, int]] = {}
    fallen: dict[int, set[int]] = {}
    for layer in layers:
        expert, tokens = expert_of(str(layer["name"])), (layer.get("details") or {}).get("routed_tokens")
        if expert is None or not isinstance(tokens, int):
            continue
        blocks.setdefault(int(layer["block"]), {})[expert] = tokens
        if layer.get("fallback") is not None:
            fallen.setdefault(int(layer["block"]), set()).add(expert)
    return [
        BlockCoverage(block, tuple(experts[number] for number in sorted(experts)), len(fallen.get(block, ())))
        for block, experts in sorted(blocks.items())
    ]

"""Greedy answers to fixed prompts: how many are the baseline's, how many repeat themselves, how many are empty."""

from __future__ import annotations

from collections.abc import Sequence

from compress.evaluation import statistics
from compress.evaluation.gating.comparison import Comparison
from compress.evaluation.gating.kinds import Degenerate, GenerationIdentical
from compress.evaluation.measures import Bounds, Measure


def measure(gate: GenerationIdentical | Degenerate, comparison: Comparison) -> list[Measure]:
    """Shares of prompts, each with the wider of the normal and the exact binomial bound."""
    answers = comparison.generation()
    count = answers.prompts
    if isinstance(gate, GenerationIdentical):
        same = answers.identical_per_prompt if comparison.alone is None else None
        flags = comparison.needed(same, f"gate {gate.id} (generation_identical)")
        share = sum(flags) / count
        return [Measure(share, _bounds(flags), gate.min, False, "share", size=count, counted="prompts")]
    flags = answers.degenerate_per_prompt
    found = [Measure(sum(flags) / count, _bounds(flags), gate.max, True, "share", size=count, counted="prompts")]
    if gate.max_empty is not None:
        empty = [1] * round(answers.empty * count)
        none = [0] * (count - len(empty))
        found.append(
            Measure(
                answers.empty,
                _bounds([*empty, *none]),
                gate.max_empty,
                True,
                "share",
                part="empty",
                size=count,
                counted="prompts",
            )
        )
    return found


def _bounds(flags: Sequence[int]) -> Bounds:
    def bounds(alpha: float) -> tuple[float, float]:
        if len(flags) < 2:
            return 0.0, 1.0
        return statistics.share_bounds(flags, [1] * len(flags), alpha)

    return bounds

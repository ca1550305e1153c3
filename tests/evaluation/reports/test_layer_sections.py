"""What the page says of experts, and how cells are tinted."""

from __future__ import annotations

from typing import Any

import pytest

from compress.artifact.coverage import coverage, expert_of
from compress.evaluation.reports.layer_sections import coverage_sections
from compress.evaluation.reports.shades import logarithmic


def expert(block: int, number: int, tokens: int, fallback: str | None = None, part: str = "up_proj") -> dict[str, Any]:
    name = f"model.layers.{block}.mlp.experts.{number}.{part}"
    return {"name": name, "block": block, "fallback": fallback, "details": {"routed_tokens": tokens}}


LAYERS = [
    *(expert(1, number, tokens) for number, tokens in ((10, 7), (2, 40), (0, 12))),
    expert(1, 3, 0, "all tokens"),
    expert(1, 3, 0, "all tokens", part="down_proj"),
    {"name": "model.layers.1.self_attn.q_proj", "block": 1, "fallback": None, "details": {"tokens": 64}},
]


def test_coverage_counts_experts_by_number() -> None:
    (block,) = coverage(LAYERS)
    assert (block.block, block.tokens, block.fallbacks, block.median) == (1, (12, 40, 0, 7), 1, 9.5)
    assert coverage(LAYERS[-1:]) == []
    assert (expert_of("a.experts.12.b"), expert_of("a.shared_experts.up_proj")) == (12, None)


def test_coverage_is_shown_per_block_and_per_expert() -> None:
    summary, each = coverage_sections(LAYERS)
    assert summary.table is not None
    assert summary.table.rows == (("1", "4", "0", "9.5", "40", "1", "1"),)
    assert each.table is not None
    assert each.table.rows == (("1", "12", "40", "0", "7"),)
    shades = each.table.shades[0]
    assert (shades[0], shades[2], shades[3]) == (None, 0.0, 1.0)
    assert shades[1] == pytest.approx(0.69, abs=0.01)
    many = [expert(0, number, 5) for number in range(65)]
    assert len(coverage_sections(many)) == 1, "too many for one row each"
    assert coverage_sections(LAYERS[-1:]) == []


def test_shades_are_logarithmic_and_know_nothing() -> None:
    assert logarithmic([[None, 1.0], [10.0, 100.0]]) == ((None, 0.0), (0.5, 1.0))
    assert logarithmic([[3.0, 3.0]]) == ((0.0, 0.0),)
    assert logarithmic([[0.0, 1.0, 100.0]]) == ((0.0, 0.0, 1.0),)
    assert logarithmic([[0.0, 1.0, 100.0]], low_is_hot=True) == ((1.0, 1.0, 0.0),)
    assert logarithmic([]) == ()

"""Scores as rows of a table: what was measured on the parent, and on the artifact with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.commands._output import number


def score_rows(record: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    """Rows (name, parent, artifact) of an eval record given as plain data; none without a record."""
    if record is None:
        return []
    summary = record["summary"]
    rows = [("perplexity", interval(summary.get("perplexity_baseline")), interval(summary.get("perplexity")))]
    if summary.get("kl_mean") is not None:
        rows += [
            ("perplexity ratio", "1", interval(summary["perplexity_ratio"])),
            ("KL per token, nats", "0", interval(summary["kl_mean"])),
            ("top-1 agreement", "100%", interval(summary["top1_agreement"], share=True)),
        ]
    return rows


def interval(value: Mapping[str, float] | None, *, share: bool = False) -> str:
    """`36.02 [35.10, 36.95]`, or `92.3% [91.8%, 92.8%]`; empty where there is no value."""
    if value is None:
        return ""
    show = (lambda x: f"{x:.2%}") if share else number
    return f"{show(value['estimate'])} [{show(value['low'])}, {show(value['high'])}]"

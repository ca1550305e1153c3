"""Scores as rows of tables: what was measured on the parent, and on the artifact with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.commands._output import number, size

Row = tuple[str, str, str]


def score_rows(record: Mapping[str, Any] | None) -> list[Row]:
    """Rows (name, parent, artifact) of an eval record given as plain data; none without a record.

    Names of a second text's measures begin with the text's name.
    """
    if record is None:
        return []
    rows: list[Row] = []
    for index, text in enumerate(record["texts"]):
        prefix = f"{text['data']['name']}: " if index else ""
        rows += [(prefix + name, parent, value) for name, parent, value in text_rows(text["summary"])]
    return rows + task_rows(record) + generation_rows(record) + cost_rows(record)


def text_rows(summary: Mapping[str, Any]) -> list[Row]:
    """Rows of one text's summary."""
    rows = [
        ("perplexity", interval(summary.get("perplexity_baseline")), interval(summary["perplexity"])),
        ("bits per byte", "", interval(summary["bits_per_byte"])),
    ]
    if summary.get("kl_mean") is None:
        return rows
    tail, change = summary["kl_percentiles"], summary["dp_percentiles"]
    rows += [
        ("perplexity ratio", "1", interval(summary["perplexity_ratio"])),
        ("KL per token, nats", "0", interval(summary["kl_mean"])),
        ("top-1 agreement", "100%", interval(summary["top1_agreement"], share=True)),
    ]
    if summary.get("top1_agreement_confident") is not None:
        rows.append(("  where it is confident", "100%", interval(summary["top1_agreement_confident"], share=True)))
    if tail is not None:
        names = [("p50", "median"), ("p90", "90%"), ("p99", "99%"), ("p999", "99.9%"), ("max", "largest")]
        rows.append(("KL percentiles", "0", ", ".join(f"{number(tail[key])} {name}" for key, name in names)))
    rows.append(("change of p(correct)", "0", f"{interval(summary['dp_mean'])}, RMS {number(summary['dp_rms'])}"))
    if change is not None:
        names = [("p001", "0.1%"), ("p01", "1%"), ("p99", "99%"), ("p999", "99.9%")]
        rows.append(("  percentiles", "0", ", ".join(f"{number(change[key])} {name}" for key, name in names)))
    return rows


def task_rows(record: Mapping[str, Any]) -> list[Row]:
    """Rows of accuracies; a task that cannot gate is marked."""
    rows = []
    for task in record["tasks"]:
        mark = "" if task["gates"] else " (shown, not gated)"
        name = f"{task['name']}, {task['metric']} of {len(task['item_ids'])}{mark}"
        rows.append((name, interval(task["accuracy_baseline"], share=True), interval(task["accuracy"], share=True)))
    return rows


def generation_rows(record: Mapping[str, Any]) -> list[Row]:
    """Rows of what the greedy answers show."""
    answers = record["generation"]
    if answers is None:
        return []
    rows = []
    if answers["identical"] is not None:
        of = f"of {answers['max_tokens']} tokens"
        rows += [
            ("greedy answers identical", "100%", f"{answers['identical']:.1%} of {answers['prompts']}"),
            ("first differing token", "", f"{number(answers['first_difference_mean'])} {of} on average"),
        ]
    rows.append(("answers that repeat themselves", "", f"{answers['degenerate']:.1%}"))
    rows.append(("empty answers", "", f"{answers['empty']:.1%}"))
    return rows


def cost_rows(record: Mapping[str, Any]) -> list[Row]:
    """Rows of speed and memory, where they were measured."""
    ours, theirs = record["cost"], record["cost_baseline"]
    if ours is None:
        return []
    measures = (
        ("decoding, tokens/s", "decode_tokens_per_second"),
        ("prefill, tokens/s", "prefill_tokens_per_second"),
        ("time to first token, s", "first_token_seconds"),
        ("load time, s", "load_seconds"),
    )
    rows = [(name, _measured(theirs, key), _measured(ours, key)) for name, key in measures]
    peaks = [cost["peak_memory_bytes"] if cost is not None else None for cost in (theirs, ours)]
    before, after = ("" if peak is None else size(peak) for peak in peaks)
    return [*rows, ("peak memory", before, after)]


def _measured(cost: Mapping[str, Any] | None, key: str) -> str:
    value = None if cost is None else cost[key]
    return "" if value is None else f"{number(value['median'])} [{number(value['low'])}, {number(value['high'])}]"


def interval(value: Mapping[str, float] | None, *, share: bool = False) -> str:
    """`36.02 [35.10, 36.95]`, or `92.3% [91.8%, 92.8%]`; empty where there is no value."""
    if value is None:
        return ""
    show = (lambda x: f"{x:.2%}") if share else number
    return f"{show(value['estimate'])} [{show(value['low'])}, {show(value['high'])}]"

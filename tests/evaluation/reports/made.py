"""Verdicts made of the gates that a test chooses."""

from __future__ import annotations

import datetime
from typing import Any

from compress.evaluation.verdict import CodeRecord, FlippedItem, GateResult, Verdict
from tests.evaluation.gate_records import environment, model, text

NASTY = 'a|b`c`<script>alert("1")</script>\n| x | y |\r\x00\x1b[31m ::error:: @team ,%0A$x^2$ ]]> & \U0001f600 -->'
"""What a name from outside may hold; no report may be broken by it."""


def gate(name: str = "kl", verdict: str = "PASS", **changed: Any) -> GateResult:
    """One gate, a mean KL of 0.016 with its limit at 0.02 unless told otherwise."""
    values: dict[str, Any] = {
        "id": name,
        "kind": "kl_mean",
        "role": "primary",
        "verdict": verdict,
        "estimate": 0.016,
        "low": 0.0147,
        "high": 0.0172,
        "limit": 0.02,
        "rule": "at most",
        "unit": "nats",
        "message": f"{name} says {verdict}",
        "baseline": "root",
        "subject": "text",
    }
    return GateResult(**{**values, **changed})


def accuracy(name: str, change: float, margin: float = 1.0, half: float = 0.6, **changed: Any) -> GateResult:
    """A gate on paired accuracy, in points."""
    values: dict[str, Any] = {
        "kind": "accuracy_paired",
        "estimate": change,
        "low": change - half,
        "high": change + half,
        "limit": -margin,
        "rule": "at least",
        "unit": "points",
        "subject": "lambada",
    }
    return gate(name, **{**values, **changed})


def verdict(*gates: GateResult, outcome: str | None = None, **changed: Any) -> Verdict:
    """A sealed verdict of these gates; the outcome follows from the primary ones unless it is given."""
    primary = {each.verdict for each in gates if each.role == "primary"}
    found = "FAIL" if "FAIL" in primary else "INCONCLUSIVE" if primary & {"INCONCLUSIVE", "SKIPPED"} else "PASS"
    names = list(dict.fromkeys(each.baseline for each in gates)) or ["root"]
    values: dict[str, Any] = {
        "verdict": outcome or found,
        "policy": "default",
        "policy_sha256": "a" * 64,
        "profile": None,
        "alpha": 0.05,
        "alpha_per_look": 0.05,
        "look": 1,
        "looks": 1,
        "candidate": model("candidate", 4_554_000, "w4a16-g128"),
        "baselines": {name: model(f"{'abcdef'[k]}-model", 11_550_000) for k, name in enumerate(names)},
        "texts": [text().data],
        "environment": environment(),
        "gates": list(gates),
        "warnings": [f"{each.id}: {each.message}" for each in gates if _only_warned(each)],
        "worst": [],
        "records": {"root": "b" * 64},
        "code": CodeRecord(version="0.1.0", sha256="c" * 64),
        "created": datetime.date(2026, 11, 21),
    }
    return Verdict(**{**values, **changed}).sealed()


def flipped(task: str, item: str, **changed: Any) -> FlippedItem:
    """An item that turned wrong."""
    return FlippedItem(**{"task": task, "item_id": item, "cluster": None, "baseline": "root", **changed})


def mixed() -> Verdict:
    """One gate of every verdict and role, two baselines, items that turned wrong."""
    share: dict[str, Any] = {"unit": "share"}
    return verdict(
        gate(
            "size", kind="size_ratio", estimate=2.536, low=2.536, high=2.536, limit=1.0, rule="at least", unit="ratio"
        ),
        gate("perplexity", kind="ppl_ratio", estimate=0.0141, low=0.0118, high=0.0164, limit=0.02, **share),
        gate("kl", "FAIL", estimate=0.031, low=0.028, high=0.034),
        gate("top1", kind="top1_agreement", estimate=0.905, low=0.9, high=0.91, limit=0.89, rule="at least", **share),
        accuracy("lambada", -1.3, half=1.2, verdict="INCONCLUSIVE", baseline="last"),
        gate("tail", "FAIL", kind="kl_p999", role="secondary", estimate=0.7, low=0.6, high=None, limit=0.5),
        gate(
            "decode",
            "SKIPPED",
            kind="speed_ratio",
            role="secondary",
            estimate=None,
            low=None,
            high=None,
            limit=None,
            rule="at least",
            unit="",
            message="not measured: measured on cpu; the gate is for cuda",
        ),
        gate(
            "memory",
            "WAIVED",
            kind="peak_memory_ratio",
            estimate=1.1,
            low=1.05,
            high=1.15,
            limit=1.0,
            unit="ratio",
            waiver="until 2027-01-01: issue 42",
        ),
        worst=[flipped("lambada", f"item-{i}") for i in range(4)] + [flipped("blimp", "x", cluster="island")] * 3,
    )


def _only_warned(each: GateResult) -> bool:
    return each.role == "secondary" and each.verdict not in ("PASS", "WAIVED")

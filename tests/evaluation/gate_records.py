"""Eval records made of numbers that a test chooses: sums whose means are known, answers, costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from compress.evaluation.gating.comparable import compare
from compress.evaluation.gating.comparison import Comparison
from compress.evaluation.records import (
    KL_THRESHOLDS,
    ClusterSums,
    DataRecord,
    DpPercentiles,
    EnvironmentRecord,
    EvalRecord,
    GenerationRecord,
    IntervalRecord,
    KlPercentiles,
    ModelRecord,
    TaskRecord,
    TextRecord,
    summarise,
)

CLUSTERS, TOKENS = 32, 2000


def forbid_scoring(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a gate that would score a model fails."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr("compress.evaluation.gating.sources.score", refuse)


def model(name: str, size: int = 1000, scheme: str = "dense") -> ModelRecord:
    """A model whose digest is made of the first letter of its name."""
    return ModelRecord(
        name=name,
        digest=name[0] * 64,
        quantized=scheme != "dense",
        scheme=scheme,
        weights_bytes=size,
        parameters=1000,
        bits_per_weight=8 * size / 1000,
        tokenizer_sha256="e" * 64,
    )


def text(
    *, kl: float = 0.02, log_ratio: float = 0.02, agree: float = 0.9, noise: float = 0.001, alone: bool = False
) -> TextRecord:
    """A text whose means are the arguments, clusters differing by `noise` up and down."""
    wave = np.where(np.arange(CLUSTERS) % 2 == 0, 1.0, -1.0)
    above = [int(TOKENS * 0.0005) if threshold > 0.1 else TOKENS for threshold in KL_THRESHOLDS]
    nll = (TOKENS * (3.5 + log_ratio + noise * wave)).tolist()
    common: dict[str, Any] = {"tokens": [TOKENS] * CLUSTERS, "text_bytes": [8000] * CLUSTERS, "nll": nll}
    tail = KlPercentiles(p50=0.01, p90=0.1, p99=0.1, p999=0.12, max=11.0)
    dp = DpPercentiles(p001=-0.4, p01=-0.1, p50=0.0, p99=0.1, p999=0.3)
    if alone:
        clusters = ClusterSums(**common)
    else:
        clusters = ClusterSums(
            **common,
            nll_baseline=[TOKENS * 3.5] * CLUSTERS,
            kl=(TOKENS * (kl + noise * wave)).tolist(),
            dp=(TOKENS * (-0.001 + noise * wave)).tolist(),
            dp2=(TOKENS * (0.0004 + 0.0001 * wave)).tolist(),
            top1_agree=(TOKENS * (agree + noise * wave)).round().astype(int).tolist(),
            confident=[1000] * CLUSTERS,
            confident_agree=(1000 * (0.97 + noise * wave)).round().astype(int).tolist(),
            kl_above=[above] * CLUSTERS,
        )
    return TextRecord(
        data=DataRecord(
            name="text",
            sha256="1" * 64,
            text_tokens=70_000,
            tokens=TOKENS * CLUSTERS,
            seq_len=512,
            windows=126,
            clusters=CLUSTERS,
            cluster_kind="blocks",
            prefix_id=0,
            windows_sha256="2" * 64,
        ),
        context=2048,
        summary=summarise(clusters, None if alone else tail, None if alone else dp),
        clusters=clusters,
        seconds=1.0,
    )


def task(
    right: int, wrong: int, turned_wrong: int, turned_right: int, *, name: str = "task", why_not: str | None = None
) -> TaskRecord:
    """A task with so many items right in both models, wrong in both, and changed in either direction."""
    pairs = [(1, 1)] * right + [(0, 0)] * wrong + [(0, 1)] * turned_wrong + [(1, 0)] * turned_right
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]

    def interval(flags: list[int]) -> IntervalRecord:
        share = sum(flags) / len(flags)
        return IntervalRecord(estimate=share, low=max(0.0, share - 0.02), high=min(1.0, share + 0.02), level=0.95)

    return TaskRecord(
        name=name,
        kind="multiple_choice",
        metric="acc",
        data_sha256="3" * 64,
        config_sha256="4" * 64,
        prompts_sha256="5" * 64,
        item_ids=[str(i) for i in range(len(pairs))],
        correct=ours,
        correct_baseline=theirs,
        chance=0.25,
        clusters=None,
        answers_sha256="6" * 64,
        answers_baseline_sha256="7" * 64,
        accuracy=interval(ours),
        accuracy_baseline=interval(theirs),
        metrics={},
        gates=why_not is None,
        why_not=why_not,
    )


def answers(identical: int, degenerate: int, empty: int, prompts: int = 40) -> GenerationRecord:
    """Greedy answers: so many as the baseline's, so many that repeat themselves, so many empty."""
    return GenerationRecord(
        prompts=prompts,
        max_tokens=64,
        prompts_sha256="8" * 64,
        identical=identical / prompts,
        first_difference_mean=(64 * identical + 10 * (prompts - identical)) / prompts,
        degenerate=degenerate / prompts,
        empty=empty / prompts,
        identical_per_prompt=[1] * identical + [0] * (prompts - identical),
        first_difference=[64] * identical + [10] * (prompts - identical),
        degenerate_per_prompt=[1] * degenerate + [0] * (prompts - degenerate),
    )


def environment(**changed: Any) -> EnvironmentRecord:
    """A CPU."""
    values: dict[str, Any] = {
        "runtime": "transformers",
        "kernel": "dense",
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "machine": "x86_64",
        "versions": {"torch": "1", "transformers": "1", "compress": "1"},
    }
    return EnvironmentRecord(**{**values, **changed})


def record(**changed: Any) -> EvalRecord:
    """A candidate of 400 bytes scored against a baseline of 1,000 on one text."""
    values: dict[str, Any] = {
        "artifact_id": None,
        "model": model("candidate", 400, "w4a16-g128"),
        "baseline": model("baseline", 1000),
        "environment": environment(),
        "suite": None,
        "texts": [text()],
        "tasks": [],
        "generation": None,
        "cost": None,
        "cost_baseline": None,
    }
    return EvalRecord(**{**values, **changed}).sealed()


def comparison(**changed: Any) -> Comparison:
    """That record as a comparison."""
    return compare(record(**changed))

"""Scores a model for a gate, on exactly what its policy asks for, or on a share of that."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import UserError
from compress.evaluation.gating.kinds import Degenerate, DeviceGate, GenerationIdentical
from compress.evaluation.policy import Policy
from compress.evaluation.record_parts import EnvironmentRecord
from compress.evaluation.records import EvalRecord
from compress.evaluation.text import DEFAULT, read_text
from compress.evaluation.window_sizes import BLOCK_TOKENS

if TYPE_CHECKING:
    from compress.evaluation.suites import Suite
    from compress.progress import Progress

FEWEST_BLOCKS = 14
"""Blocks of the smallest look. With fewer, bounds at the small alpha of one look err more often than they say, and over
five looks the gate would pass 6.7% of the candidates that lie on the limit (tests/evaluation/test_verdict_rates.py)."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """How to score what has no scores; `cache_dir` keeps finished work of a killed run."""

    device: str = "auto"
    dtype: str = "auto"
    kernel: str = "auto"
    cache_dir: str | Path | None = None
    progress: Progress | None = None

    def takes(self, environment: EnvironmentRecord) -> bool:
        """Whether scores that were computed so serve: any, unless a kernel is named."""
        return self.kernel in ("auto", environment.scoring_kernel())

    def like(self, environment: EnvironmentRecord) -> Scoring:
        """To be compared with scores that were computed so: what is left to choose is as there."""
        kernel = environment.scoring_kernel()
        if kernel is None:
            return self
        return dataclasses.replace(
            self,
            device=environment.device if self.device == "auto" else self.device,
            dtype=environment.dtype if self.dtype == "auto" else self.dtype,
            kernel=kernel if self.kernel == "auto" else self.kernel,
        )

    def for_all(self, models: Sequence[str | Path]) -> Scoring:
        """All of `models` are scored alike, whichever two of them are scored together."""
        from compress.evaluation.scoring_kernel import chosen_kernel

        if self.kernel != "auto" or len(models) <= 2:  # `evaluate` sees to two of them
            return self
        kernel = chosen_kernel(models, self.device, self.dtype, self.kernel, self.progress)
        return dataclasses.replace(self, kernel=kernel)


def score(
    candidate: str | Path, baseline: str | Path | None, policy: Policy, scoring: Scoring, share: float = 1.0
) -> EvalRecord:
    """Scores a candidate, with a baseline in lock-step, on a share of what the policy asks for.

    Raises:
        UserError: the policy has gates on what nothing tells how to score, or no such model.
        IntegrityError, WorkError: as `evaluate`.
    """
    from compress.evaluation.evaluate import evaluate

    options: dict[str, Any] = dataclasses.asdict(dataclasses.replace(scoring, progress=None))
    options["progress"] = scoring.progress
    if policy.suite is not None:
        return evaluate(candidate, baseline, suite=suite_of(policy, share), **options)
    for gate in policy.gate:
        if isinstance(gate, GenerationIdentical | Degenerate):
            raise UserError(
                f"nothing says which prompts the gate {gate.id} ({gate.kind}) is about",
                "name a suite that generates in the policy (`suite = ...`), or give the gate eval.json files",
            )
    if unknown := sorted(policy.texts() - {policy.data or DEFAULT}):
        raise UserError(
            f"nothing says how to score the text {unknown[0]!r} that a gate names",
            "name a suite that holds it in the policy (`suite = ...`), or give the gate eval.json files",
        )
    return evaluate(
        candidate,
        baseline,
        data=policy.data or DEFAULT,
        max_tokens=planned_tokens(candidate, policy, share),
        seq_len=policy.seq_len,
        tasks=_tasks(policy, share),
        cost=any(isinstance(gate, DeviceGate) for gate in policy.gate),
        **options,
    )


def suite_of(policy: Policy, share: float = 1.0) -> Suite:
    """The policy's suite, or a share of it: every bounded number of tokens and items scaled."""
    from compress.evaluation.suites import load_suite

    assert policy.suite is not None
    suite = load_suite(policy.suite)
    if share >= 1.0:
        return suite
    texts = [
        text.model_copy(update={"max_tokens": _scaled(text.max_tokens, share, _smallest(text.seq_len))})
        for text in suite.texts
    ]
    tasks = [task.model_copy(update={"items": _scaled(task.items, share)}) for task in suite.tasks]
    return suite.model_copy(update={"texts": texts, "tasks": tasks})


def planned_tokens(model: str | Path, policy: Policy, share: float) -> int | None:
    """Tokens of the policy's text to score; None for all of them."""
    if share >= 1.0:
        return policy.max_tokens
    from compress.models.checkpoint import Checkpoint
    from compress.runtime.transformers_loader import load_tokenizer

    tokenizer: Any = load_tokenizer(Checkpoint.open(model))
    documents = read_text(policy.data or DEFAULT).documents
    total = sum(len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in documents)
    return _scaled(min(total, policy.max_tokens or total), share, _smallest(policy.seq_len))


def _smallest(seq_len: int | None = None) -> int:
    """Tokens of the smallest look; a window longer than a block is a block of its own."""
    return FEWEST_BLOCKS * max(BLOCK_TOKENS, seq_len or 0)


def _scaled(count: int | None, share: float, least: int = 1) -> int | None:
    return None if count is None else min(count, max(least, round(share * count)))


def _tasks(policy: Policy, share: float) -> list[Any]:
    gates = policy.tasks()
    if not gates:
        return []
    from compress.evaluation.suites import SuiteTask

    return [SuiteTask(name=gate.task, items=_scaled(gate.items, share)) for gate in gates]

"""Scoring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compress.workflows.api._given import PathLike, model_or_packaged

if TYPE_CHECKING:
    from compress.evaluation.records import EvalRecord
    from compress.progress import Progress


def evaluate(
    model: PathLike | None = None,
    baseline: PathLike | None = None,
    *,
    suite: PathLike | None = None,
    data: PathLike | None = None,
    tasks: Sequence[str] = (),
    max_tokens: int | None = None,
    seq_len: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    kernel: str = "auto",
    cost: bool = False,
    cache_dir: PathLike | None = None,
    trust_code: bool = False,
    progress: Progress | None = None,
) -> EvalRecord:
    """Score a model or artifact: perplexity, tasks, and with a `baseline` KL, agreement and what flipped.

    Args:
        model: Model directory, hub id or artifact; the packaged model if None.
        baseline: What to compare with, on the same tokens.
        suite: `smoke`, `pr`, `nightly`, `release` or a suite file; default the packaged held-out text alone.
        data: Name of a text or path of a UTF-8 or JSONL file, in place of the suite's texts.
        tasks: Tasks besides the suite's, by name (`blimp:500` for 500 items) or file.
        max_tokens: At most so many tokens of a text, spread evenly over it; default the suite's, else all.
        seq_len: Tokens per window; default 512, or the context where that is shorter.
        device: `auto`, `cpu` or `cuda`.
        dtype: Compute dtype of both; `auto` is float32 on a CPU.
        kernel: What computes both: `cpu`, `cpu-int8` or `triton`, the engine's, which is deterministic then;
            `reference`, transformers; `auto`, `cpu` where the engine computes both on a CPU, else `reference`.
        cost: Whether to measure load time, memory and speed too.
        cache_dir: Where finished answers are kept, so that a killed evaluation goes on; nowhere if None.
        trust_code: Whether to execute the Python scorers and programs that tasks name.
        progress: Where to report; nowhere if None.

    Returns:
        The record: `.text().summary` holds a text's estimates with 95% intervals, `.text().clusters` the sums that
        they follow from, `.tasks` the answers.

    Raises:
        UserError, IntegrityError, WorkError: as `compress.evaluation.evaluate.evaluate`.
    """
    from compress.evaluation.evaluate import evaluate as run

    return run(
        model_or_packaged(model),
        baseline,
        suite=suite,
        data=data,
        tasks=tasks,
        max_tokens=max_tokens,
        seq_len=seq_len,
        device=device,
        dtype=dtype,
        kernel=kernel,
        cost=cost,
        cache_dir=cache_dir,
        trust_code=trust_code,
        progress=progress,
    )

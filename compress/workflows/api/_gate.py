"""Deciding on a release."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from compress.workflows.api._given import PathLike

if TYPE_CHECKING:
    from compress.evaluation.policy import Policy
    from compress.evaluation.verdict import Verdict
    from compress.progress import Progress


def gate(
    candidate: PathLike,
    baseline: PathLike | Mapping[str, PathLike] | None = None,
    policy: PathLike | Policy | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    kernel: str = "auto",
    cache_dir: PathLike | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Decide whether a candidate may be released: PASS, FAIL or INCONCLUSIVE, each gate with its interval.

    Args:
        candidate: An eval.json, an artifact or a model directory.
        baseline: The same; not needed where the candidate's scores were taken against one. Several as a mapping from
            the names that the policy's gates use, such as `{"root": ..., "last": ...}`.
        policy: A policy file, a packaged one by name, or a Policy; the packaged default if None.
        device: Where to score what has no scores.
        dtype: Compute dtype of that.
        kernel: What computes it, as in `evaluate`; with `auto`, scores that are there are used whatever computed them.
        cache_dir: Where finished work is kept, so that a killed run goes on.
        progress: Where to report; nowhere if None.

    Raises:
        UserError, IntegrityError, WorkError: as `compress.evaluation.gate.gate`.
    """
    from compress.evaluation.gate import gate as run

    return run(
        candidate,
        baseline,
        policy,
        device=device,
        dtype=dtype,
        kernel=kernel,
        cache_dir=cache_dir,
        progress=progress,
    )

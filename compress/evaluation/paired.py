"""Two candidates against the same baseline on the same tokens: whose KL is smaller, and by how much. Free of torch."""

from __future__ import annotations

from compress.errors import IntegrityError
from compress.evaluation.records import EvalRecord
from compress.evaluation.statistics import LEVEL, Interval, mean_difference, ratio


def kl_ratio(first: EvalRecord, second: EvalRecord, level: float = LEVEL) -> Interval:
    """Mean KL of `first` over mean KL of `second`, paired by block: 0.9 means a tenth less; 1 - ratio is won back.

    Raises:
        IntegrityError: the records are of other tokens or another baseline, or hold no KL.
        WorkError: `second` has no KL at all.
    """
    ours, theirs = _kl_sums(first, second)
    return ratio(ours, theirs, level)


def kl_difference(first: EvalRecord, second: EvalRecord, level: float = LEVEL) -> Interval:
    """Mean KL per token of `first` minus that of `second`, paired by block; raises as `kl_ratio`."""
    ours, theirs = _kl_sums(first, second)
    return mean_difference(ours, theirs, first.blocks.tokens, level)


def _kl_sums(first: EvalRecord, second: EvalRecord) -> tuple[list[float], list[float]]:
    a, b = first.baseline, second.baseline
    if a is None or b is None or first.blocks.kl is None or second.blocks.kl is None:
        raise IntegrityError(
            f"{first.model.name} and {second.model.name} cannot be compared in KL: one was scored alone",
            "score both with `compress eval CANDIDATE --baseline BASELINE`",
        )
    same = [
        ("baseline", a.digest, b.digest),
        ("tokens", first.data.windows_sha256, second.data.windows_sha256),
        ("blocks", first.blocks.tokens, second.blocks.tokens),
        ("dtype", first.environment.dtype, second.environment.dtype),
    ]
    for what, ours, theirs in same:
        if ours != theirs:
            raise IntegrityError(
                f"{first.model.name} and {second.model.name} cannot be compared in KL: another {what}",
                "score both on the same text, against the same baseline, with the same settings",
            )
    return first.blocks.kl, second.blocks.kl

"""Two candidates against the same baseline on the same tokens: whose KL is smaller, and by how much. Free of torch."""

from __future__ import annotations

from compress.errors import IntegrityError
from compress.evaluation.records import EvalRecord
from compress.evaluation.statistics import LEVEL, Interval, mean_difference, ratio


def kl_ratio(first: EvalRecord, second: EvalRecord, text: str | None = None, level: float = LEVEL) -> Interval:
    """Mean KL of `first` over that of `second`, paired by cluster: 0.9 means a tenth less; 1 - ratio is won back.

    text: the name of a text that both were scored on; the first of each record if None.

    Raises:
        IntegrityError: the records are of other tokens or another baseline, or hold no KL or no such text.
        WorkError: `second` has no KL at all, or there are fewer than two clusters.
    """
    ours, theirs, _ = _kl_sums(first, second, text)
    return ratio(ours, theirs, level)


def kl_difference(first: EvalRecord, second: EvalRecord, text: str | None = None, level: float = LEVEL) -> Interval:
    """Mean KL per token of `first` minus that of `second`, paired by cluster; takes and raises as `kl_ratio`."""
    ours, theirs, tokens = _kl_sums(first, second, text)
    return mean_difference(ours, theirs, tokens, level)


def _kl_sums(first: EvalRecord, second: EvalRecord, text: str | None) -> tuple[list[float], list[float], list[int]]:
    """KL sums of both and the tokens, per cluster."""
    a, b = first.baseline, second.baseline
    ours, theirs = first.text(text), second.text(text)
    if a is None or b is None or ours.clusters.kl is None or theirs.clusters.kl is None:
        raise IntegrityError(
            f"{first.model.name} and {second.model.name} cannot be compared in KL: one was scored alone",
            "score both with `compress eval CANDIDATE --baseline BASELINE`",
        )
    machine = second.environment.arithmetic()
    same = [
        ("baseline", a.digest, b.digest),
        ("tokens", ours.data.windows_sha256, theirs.data.windows_sha256),
        ("clusters", ours.clusters.tokens, theirs.clusters.tokens),
        *((field, value, machine[field]) for field, value in first.environment.arithmetic().items()),
    ]
    for what, this, that in same:
        if this != that:
            raise IntegrityError(
                f"{first.model.name} and {second.model.name} cannot be compared in KL: another {what}",
                "score both on the same text, against the same baseline, with the same settings",
            )
    return ours.clusters.kl, theirs.clusters.kl, ours.clusters.tokens

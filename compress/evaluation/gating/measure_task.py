"""Paired accuracy: how many points were lost, and how many answers changed.

With b items that only the baseline has right and c that only the candidate has, the loss is (c - b) / n and the flips
(b + c) / n. Where items belong together (the paradigms of BLiMP, the subjects of MMLU), the wider of the interval
over items and of that over clusters counts: neighbours are alike, and clusters without flips show no variance.
"""

from __future__ import annotations

from compress.evaluation import statistics
from compress.evaluation.gating.comparison import PairedTask
from compress.evaluation.gating.kinds import AccuracyPaired
from compress.evaluation.measures import Bounds, Measure, Skipped


def measure(gate: AccuracyPaired, task: PairedTask) -> list[Measure] | Skipped:
    """The change of accuracy in points, and, where the gate limits them, the flips."""
    if task.why_not is not None:
        return Skipped(task.why_not, gate.task)
    from compress.evaluation.statistics import mcnemar_midp, pairs_of

    pairs = pairs_of(task.correct_baseline, task.record.correct)
    note = (
        f"{pairs.base_only} items turned wrong and {pairs.cand_only} right of {pairs.n}, "
        f"McNemar mid-p {mcnemar_midp(pairs):.3g}"
    )
    found = [
        Measure(
            100 * pairs.difference,
            _change(task),
            -gate.margin,
            False,
            "points",
            subject=gate.task,
            size=pairs.n,
            counted="items",
            flips=pairs.flips,
            note=note,
        )
    ]
    if gate.max_flips is not None:
        found.append(
            Measure(
                pairs.flips,
                _flips(task),
                gate.max_flips,
                True,
                "share",
                part="flips",
                subject=gate.task,
                size=pairs.n,
                counted="items",
            )
        )
    return found


def _change(task: PairedTask) -> Bounds:
    from compress.evaluation.statistics import clustered_difference, paired_difference, pairs_of

    ours, theirs = task.record.correct, task.correct_baseline
    clusters = _clusters(task)

    def bounds(alpha: float) -> tuple[float, float]:
        level = 1 - 2 * alpha
        if clusters is None:
            found = paired_difference(pairs_of(theirs, ours), level)
        else:
            found = clustered_difference(theirs, ours, clusters, level)
        return 100 * found.low, 100 * found.high

    return bounds


def _flips(task: PairedTask) -> Bounds:
    from compress.evaluation.statistics import by_cluster

    changed = [int(a != b) for a, b in zip(task.record.correct, task.correct_baseline, strict=True)]
    hits, sizes = by_cluster(changed, _clusters(task) or list(range(len(changed))))
    return lambda alpha: statistics.share_bounds([round(hit) for hit in hits], sizes, alpha)


def _clusters(task: PairedTask) -> list[str] | None:
    """The clusters of the items, where there are at least two of them."""
    clusters = task.record.clusters
    return clusters if clusters is not None and len(set(clusters)) > 1 else None

"""Several scored models side by side, and each against the first in pairs, where the records allow it.

Two models scored on the same tokens or items share what makes these hard or easy, so their ratio or difference is
known far better than either of them: intervals of pairs come from the sums per cluster and the answers per item, never
from the two separate intervals. What cannot be paired is listed with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from compress.errors import UserError
from compress.evaluation import statistics
from compress.evaluation.record_base import IntervalRecord
from compress.evaluation.records import EvalRecord, TaskRecord, TextRecord
from compress.evaluation.reports.plots.front import best_for_size

ARITHMETIC = ("runtime", "device", "dtype")
"""What must be equal for two models' numbers to differ by their weights alone."""


@dataclass(frozen=True, slots=True)
class Model:
    """One column of figures. `text` is None where the model was not scored on the common text; `tasks` by name.

    `best`: no other model with the same baseline and text is as small and as close to it; None where its size or its
    KL is not known.
    """

    name: str
    record: EvalRecord
    text: TextRecord | None
    tasks: dict[str, IntervalRecord]
    best: bool | None

    @property
    def loss(self) -> IntervalRecord | None:
        """Mean KL to the baseline, nats per token."""
        return None if self.text is None else self.text.summary.kl_mean


@dataclass(frozen=True, slots=True)
class Paired:
    """`second` against `first`: a ratio (1 is no difference) or a difference in points (0 is none).

    `worse`: +1 where larger is worse for the second, -1 where it is better. `p_value` is McNemar's, mid-p.
    """

    first: str
    second: str
    what: str
    unit: str
    estimate: float
    low: float
    high: float
    level: float
    worse: int
    p_value: float | None = None


@dataclass(frozen=True, slots=True)
class Unpaired:
    """A comparison that the records do not allow, and why."""

    first: str
    second: str
    what: str
    why: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """The whole. `text` is the name of the text that the figures are about, None where there is no common one."""

    text: str | None
    models: tuple[Model, ...]
    paired: tuple[Paired, ...]
    unpaired: tuple[Unpaired, ...]


def compare(records: Sequence[EvalRecord], names: Sequence[str] | None = None, text: str | None = None) -> Comparison:
    """Puts records side by side; each after the first is compared with the first.

    names: how the models are called, the records' own names if None; equal names get a number.
    text: which scored text the figures are about; the first that all records hold, or the first at all, if None.

    Raises:
        UserError: no record, or no record holds the text asked for.
    """
    if not records:
        raise UserError("nothing to compare", "give eval files or artifacts")
    chosen = text or _common_text(records)
    if text is not None and not any(each.data.name == text for record in records for each in record.texts):
        there = sorted({each.data.name for record in records for each in record.texts})
        raise UserError(f"no record was scored on {text!r}", f"scored texts: {', '.join(there) or 'none'}")
    called = _names(names or [record.model.name for record in records])
    texts = [next((each for each in record.texts if each.data.name == chosen), None) for record in records]
    best = _best(records, texts)
    models = tuple(
        Model(name, record, scored, {task.name: task.accuracy for task in record.tasks}, front)
        for name, record, scored, front in zip(called, records, texts, best, strict=True)
    )
    found = [each for second in models[1:] for each in _pair(models[0], second)]
    return Comparison(
        chosen,
        models,
        tuple(each for each in found if isinstance(each, Paired)),
        tuple(each for each in found if isinstance(each, Unpaired)),
    )


def _common_text(records: Sequence[EvalRecord]) -> str | None:
    everywhere = [
        text.data.name
        for text in records[0].texts
        if all(any(other.data.name == text.data.name for other in record.texts) for record in records)
    ]
    anywhere = [text.data.name for record in records for text in record.texts]
    return next(iter(everywhere or anywhere), None)


def _names(names: Sequence[str]) -> list[str]:
    """The names, those that occur more than once numbered."""
    count = dict.fromkeys(names, 0)
    called = []
    for name in names:
        count[name] += 1
        called.append(f"{name} #{count[name]}" if list(names).count(name) > 1 else name)
    return called


def _best(records: Sequence[EvalRecord], texts: Sequence[TextRecord | None]) -> list[bool | None]:
    """For each record whether none with the same tokens, baseline and arithmetic is as small and as good."""
    found: list[bool | None] = [None] * len(records)
    groups: dict[tuple[str, ...], dict[int, tuple[float, float]]] = {}
    for i, (record, text) in enumerate(zip(records, texts, strict=True)):
        size, loss = record.model.weights_bytes, None if text is None else text.summary.kl_mean
        if record.baseline is not None and text is not None and size is not None and loss is not None:
            key = (record.baseline.digest, text.data.windows_sha256, *record.environment.arithmetic().values())
            groups.setdefault(key, {})[i] = (float(size), loss.estimate)
    for members in groups.values():
        for i, flag in zip(members, best_for_size(list(members.values())), strict=True):
            found[i] = flag
    return found


def _pair(first: Model, second: Model) -> Iterator[Paired | Unpaired]:
    ours, theirs = second.record.environment, first.record.environment
    other = [
        f"{f} {getattr(theirs, f)} and {getattr(ours, f)}" for f in ARITHMETIC if getattr(ours, f) != getattr(theirs, f)
    ]
    if other:
        yield Unpaired(first.name, second.name, "everything", f"computed by other arithmetic: {', '.join(other)}")
        return
    yield from _texts(first, second)
    tasks = {task.name: task for task in first.record.tasks}
    for task in second.record.tasks:
        if task.name in tasks:
            yield _task(first.name, second.name, tasks[task.name], task)
    for name in sorted({task.name for task in second.record.tasks} ^ set(tasks)):
        yield Unpaired(first.name, second.name, f"accuracy on {name}", "only one of them was scored on it")


def _texts(first: Model, second: Model) -> Iterator[Paired | Unpaired]:
    """Perplexity and KL on the common text."""
    a, b = first.text, second.text
    if a is None or b is None:
        if a is not b:
            yield Unpaired(first.name, second.name, "perplexity and KL", "only one of them was scored on the text")
        return
    if a.data.windows_sha256 != b.data.windows_sha256 or a.clusters.tokens != b.clusters.tokens:
        yield Unpaired(first.name, second.name, "perplexity and KL", f"other tokens under the name {a.data.name}")
        return
    tokens = a.clusters.tokens
    ratio = statistics.perplexity_ratio(b.clusters.nll, a.clusters.nll, tokens)
    yield Paired(
        first.name, second.name, "perplexity ratio", "ratio", ratio.estimate, ratio.low, ratio.high, ratio.level, 1
    )  # fmt: skip
    why = _kl_hindrance(first.record, second.record, a, b)
    if why is not None:
        yield Unpaired(first.name, second.name, "KL ratio", why)
        return
    assert a.clusters.kl is not None
    assert b.clusters.kl is not None
    kl = statistics.ratio(b.clusters.kl, a.clusters.kl)
    yield Paired(first.name, second.name, "KL ratio", "ratio", kl.estimate, max(kl.low, 0.0), kl.high, kl.level, 1)


def _kl_hindrance(first: EvalRecord, second: EvalRecord, a: TextRecord, b: TextRecord) -> str | None:
    """Why the ratio of two KLs cannot be told; None where it can."""
    if first.baseline is None or second.baseline is None:
        alone = first if first.baseline is None else second
        return f"{alone.model.name} was scored without a baseline"
    if first.baseline.digest != second.baseline.digest:
        return f"other baselines: {first.baseline.name} and {second.baseline.name}"
    if a.clusters.kl is None or b.clusters.kl is None or not sum(a.clusters.kl) > 0.0:
        return f"{first.model.name} has no KL to compare with: it answers as its baseline does"
    return None


def _task(first: str, second: str, a: TaskRecord, b: TaskRecord) -> Paired | Unpaired:
    """Change of accuracy in points on the same items."""
    from compress.evaluation.statistics import clustered_difference, mcnemar_midp, paired_difference, pairs_of

    what = f"accuracy on {a.name}"
    for why, field in (
        ("other items", "item_ids"),
        ("other data", "data_sha256"),
        ("other prompts", "prompts_sha256"),
        ("another task configuration", "config_sha256"),
        ("another metric", "metric"),
    ):
        if getattr(a, field) != getattr(b, field):
            return Unpaired(first, second, what, why)
    pairs = pairs_of(a.correct, b.correct)
    found = [paired_difference(pairs, statistics.LEVEL)]
    if a.clusters is not None and len(set(a.clusters)) > 1:
        found.append(clustered_difference(a.correct, b.correct, a.clusters, statistics.LEVEL))
    return Paired(
        first, second, what, "points", 100 * (pairs.cand_only - pairs.base_only) / pairs.n,
        100 * min(each.low for each in found), 100 * max(each.high for each in found), statistics.LEVEL, -1,
        float(mcnemar_midp(pairs)),
    )  # fmt: skip

"""From comparisons and a policy to a verdict. Free of torch.

All primary gates have to pass (an intersection-union test, so the risk of a false pass stays at alpha without
correction). What could not be told is never a pass unless the policy says `warn` or a waiver holds; what was not
measured is none even then, but for a waiver.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import compress
from compress.artifact.canonical import sha256_json
from compress.errors import UserError
from compress.evaluation.gating.comparison import Comparison
from compress.evaluation.gating.judge import apply_waivers, holm_secondary, judge, skipped
from compress.evaluation.gating.kinds import Gate
from compress.evaluation.gating.noise_record import NoiseRecord
from compress.evaluation.measures import Skipped, measure
from compress.evaluation.policy import Policy
from compress.evaluation.records import DataRecord
from compress.evaluation.verdict import CodeRecord, FlippedItem, GateResult, Outcome, Verdict

WORST = 5


@dataclass(frozen=True, slots=True)
class Look:
    """One of `of` looks at growing data, each with its share of alpha (see `spent_alpha`)."""

    number: int = 1
    of: int = 1


def alpha_per_look(policy: Policy) -> float:
    """What one look may spend of the policy's alpha: all of it, unless the policy extends."""
    if policy.on_inconclusive != "extend":
        return policy.alpha
    from compress.evaluation.statistics import spent_alpha

    return spent_alpha(policy.alpha, policy.looks)


def decide(
    comparisons: Mapping[str, Comparison],
    policy: Policy,
    *,
    text: str | None = None,
    look: Look | None = None,
    noise: NoiseRecord | None = None,
    today: datetime.date | None = None,
) -> Verdict:
    """Holds a candidate's comparisons, by name of the baseline, against a policy.

    text: name of the text that gates are about which name none; the record's first if None.

    Raises:
        UserError: a gate names a baseline that is not there, or two profiles fit the candidate.
        IntegrityError: a comparison lacks what a gate needs.
    """
    day = today or datetime.datetime.now(datetime.UTC).date()
    alpha = alpha_per_look(policy)
    first = next(iter(comparisons.values()))
    profile, gates = policy.for_scheme(first.candidate.scheme)
    results: list[GateResult] = []
    for gate in gates:
        results += _results(gate, against(gate, comparisons), policy, alpha, text)
    results, warnings = apply_waivers(holm_secondary(results, alpha), policy.waiver, day)
    outcome, unmet = overall(results, policy)
    at = look or Look()
    return Verdict(
        verdict=outcome,
        policy=policy.name,
        policy_sha256=policy.sha256(),
        profile=profile,
        alpha=policy.alpha,
        alpha_per_look=alpha,
        look=at.number,
        looks=at.of,
        candidate=first.candidate,
        baselines={name: each.baseline for name, each in comparisons.items()},
        texts=_texts(comparisons.values()),
        environment=first.record.environment,
        gates=results,
        warnings=warnings + unmet,
        worst=_worst(comparisons.values(), gates),
        noise=noise,
        records=_records(comparisons),
        code=code_record(),
        created=day,
    ).sealed()


def overall(results: Sequence[GateResult], policy: Policy) -> tuple[Outcome, list[str]]:
    """The outcome, and warnings about what did not block."""
    primary = {result.verdict for result in results if result.role == "primary"}
    secondary = [r for r in results if r.role == "secondary" and r.verdict not in ("PASS", "WAIVED")]
    blocks = policy.secondary == "block" and any(r.verdict == "FAIL" for r in secondary)
    warnings = [f"{r.id}: {r.message}" for r in secondary if not (blocks and r.verdict == "FAIL")]
    if "FAIL" in primary or blocks:
        return "FAIL", warnings
    if primary & {"INCONCLUSIVE", "SKIPPED"}:
        if policy.on_inconclusive == "fail":
            return "FAIL", warnings
        if policy.on_inconclusive != "warn" or "SKIPPED" in primary:
            return "INCONCLUSIVE", warnings
        open_ = [r for r in results if r.role == "primary" and r.verdict == "INCONCLUSIVE"]
        warnings += [f"{r.id}: {r.message}" for r in open_]
    return "PASS", warnings


def _results(gate: Gate, comparison: Comparison, policy: Policy, alpha: float, text: str | None) -> list[GateResult]:
    found = measure(gate, comparison, seed=policy.seed, text=text)
    if isinstance(found, Skipped):
        return [skipped(gate, found, comparison.name)]
    return [judge(gate, each, alpha, comparison.name) for each in found]


def against(gate: Gate, comparisons: Mapping[str, Comparison]) -> Comparison:
    if gate.baseline is None:
        return next(iter(comparisons.values()))
    if gate.baseline not in comparisons:
        raise UserError(
            f"the gate {gate.id} compares with the baseline {gate.baseline!r}; given: {', '.join(comparisons)}",
            f"add --baseline {gate.baseline}=PATH",
        )
    return comparisons[gate.baseline]


def _texts(comparisons: Iterable[Comparison]) -> list[DataRecord]:
    found: dict[str, DataRecord] = {}
    for comparison in comparisons:
        for text in comparison.record.texts:
            found.setdefault(text.data.name, text.data)
    return list(found.values())


def _worst(comparisons: Iterable[Comparison], gates: Sequence[Gate]) -> list[FlippedItem]:
    """Items that turned wrong, of the tasks that both sides hold."""
    found = []
    for comparison in comparisons:
        for record in comparison.record.tasks:
            if comparison.alone is not None and record.name not in {t.name for t in comparison.alone.tasks}:
                continue
            task = comparison.task(record.name)
            turned = [
                i
                for i, (ours, theirs) in enumerate(zip(record.correct, task.correct_baseline, strict=True))
                if theirs > ours
            ]
            clusters = record.clusters
            found += [
                FlippedItem(
                    task=record.name,
                    item_id=record.item_ids[i],
                    cluster=None if clusters is None else clusters[i],
                    baseline=comparison.name,
                )
                for i in turned[:WORST]
            ]
    return found


def _records(comparisons: Mapping[str, Comparison]) -> dict[str, str]:
    found = {}
    for name, comparison in comparisons.items():
        found[name] = comparison.record.sha256
        if comparison.alone is not None:
            found[f"{name} alone"] = comparison.alone.sha256
    return found


@functools.cache
def code_record() -> CodeRecord:
    """The version of the package and the hash of the sources of its evaluation."""
    root = Path(__file__).resolve().parent.parent
    sources = {path.relative_to(root).as_posix(): path.read_text("utf-8") for path in sorted(root.rglob("*.py"))}
    return CodeRecord(version=compress.__version__, sha256=sha256_json(sources))

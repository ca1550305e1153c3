"""Whether an engine loads an artifact, and what would go wrong: rules kept as data (engines.yaml) over its facts.

Nothing is loaded but headers and config.json, and no engine needs to be installed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

import yaml

from compress.errors import UserError
from compress.models.checkpoint import Checkpoint
from compress.workflows.engine_facts import Facts, facts_of

Answer = Literal["loads", "loads with warnings", "not known", "does not load"]
Verdict = Literal["fails", "unknown", "warns"]
_WORST: dict[Verdict, Answer] = {
    "fails": "does not load",
    "unknown": "not known",
    "warns": "loads with warnings",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that holds: for which linear first (None: for the model), for how many, and what to do.

    Where it is that no rule covers something, the verdict is unknown.
    """

    rule: str
    verdict: Verdict
    why: str
    hint: str
    linear: str | None
    linears: int
    source: str
    date: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What an engine does with an artifact; what keeps it from loading comes first."""

    engine: str
    format: str
    answer: Answer
    findings: list[Finding]


def engines() -> list[str]:
    """The engines that there are rules for."""
    return list(_rules()["engines"])


def diagnose(checkpoint: Checkpoint, engine: str, gpus: int = 1) -> Diagnosis:
    """Whether `engine` loads a model directory, its linears split over `gpus` (tensor parallelism).

    Raises:
        UserError: an engine without rules, or without such about several GPUs.
    """
    if engine not in engines():
        raise UserError(f"unknown engine {engine!r}", f"there are rules for {', '.join(engines())}")
    if gpus > 1 and engine not in (known := [name for name in engines() if _knows_splits(name)]):
        raise UserError(
            f"no rule here says what {engine} does on several GPUs", f"{' and '.join(known)} have such rules"
        )
    model, linears = facts_of(checkpoint, gpus)
    findings: list[Finding] = []
    rules = [*_rules()["common"], *_rules()["engines"][engine]]
    for rule in rules:
        if rule["verdict"] == "loads":
            continue
        hit = [name for name, facts in linears.items() if _holds(rule["when"], {**model, **facts})]
        if hit or _holds(rule["when"], model):
            about = hit[0] if hit and not rule["when"].keys() <= model.keys() else None
            findings.append(
                Finding(
                    rule=rule["id"],
                    verdict=rule["verdict"],
                    why=rule["why"],
                    hint=rule["hint"],
                    linear=about,
                    linears=len(hit) if about else 0,
                    source=rule["source"],
                    date=str(rule["date"]),
                )
            )
    if all(finding.verdict != "fails" for finding in findings):
        findings += _uncovered([rule["when"] for rule in rules if rule["verdict"] == "loads"], engine, model, linears)
    order = list(_WORST)
    findings.sort(key=lambda finding: order.index(finding.verdict))
    answer = _WORST[findings[0].verdict] if findings else "loads"
    return Diagnosis(engine, str(model["format"]), answer, findings)


def _uncovered(
    known: Sequence[Mapping[str, Any]], engine: str, model: Facts, linears: Mapping[str, Facts]
) -> Iterator[Finding]:
    """What no rule says that the engine reads: the architecture, or the weights. known: conditions of such rules."""
    of_models = [when for when in known if when.keys() == {"model_type"}]
    of_weights = [when for when in known if when.keys() != {"model_type"}]
    if not any(_holds(when, model) for when in of_models):
        yield _unknown("architecture", f"whether {engine} knows models of type {model['model_type']}")
    missed = [name for name, facts in linears.items() if not any(_holds(w, {**model, **facts}) for w in of_weights)]
    if missed or (not linears and not any(_holds(when, model) for when in of_weights)):
        what = f"{linears[missed[0]].get('kind')} weights in {model['format']}" if missed else str(model["format"])
        yield _unknown("weights", f"whether {engine} reads {what}", missed)


def _unknown(rule: str, what: str, linears: Sequence[str] = ()) -> Finding:
    return Finding(
        rule=f"uncovered-{rule}",
        verdict="unknown",
        why=f"no rule here says {what}",
        hint="try the engine's own loader before a release",
        linear=linears[0] if linears else None,
        linears=len(linears),
        source="none",
        date="",
    )


def _knows_splits(engine: str) -> bool:
    return any("whole_groups" in rule["when"] for rule in _rules()["engines"][engine])


def _holds(when: Mapping[str, Any], facts: Facts) -> bool:
    return all(name in facts and _fits(wanted, facts[name]) for name, wanted in when.items())


def _fits(wanted: Any, value: str | int | bool) -> bool:
    if isinstance(wanted, list):
        return value in wanted
    ((kind, limit),) = wanted.items()
    if kind == "not":
        return value not in limit
    if kind == "not_multiple_of":
        return int(value) % int(limit) != 0
    if kind == "over":
        return int(value) > int(limit)
    raise ValueError(f"engines.yaml has the unknown condition {kind}")


@cache
def _rules() -> dict[str, Any]:
    text = resources.files("compress.workflows").joinpath("engines.yaml").read_text(encoding="utf-8")
    rules: dict[str, Any] = yaml.safe_load(text)
    return rules

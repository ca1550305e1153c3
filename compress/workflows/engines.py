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

from compress.errors import IntegrityError, UserError
from compress.evaluation.costs.sizes import classify
from compress.formats.compressed_tensors import is_for_own_reader
from compress.formats.gptq import QUANT_METHOD as GPTQ
from compress.formats.layouts import quantized_linears
from compress.formats.registry import format_of, schemes_of
from compress.models.checkpoint import Checkpoint
from compress.types import BlockFloatScheme, Fp8Scheme, IntScheme, NormalFloatScheme, Scheme

Facts = dict[str, str | int | bool]
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


def diagnose(checkpoint: Checkpoint, engine: str) -> Diagnosis:
    """Whether `engine` loads a model directory.

    Raises:
        UserError: an engine without rules.
    """
    if engine not in engines():
        raise UserError(f"unknown engine {engine!r}", f"there are rules for {', '.join(engines())}")
    model, linears = facts_of(checkpoint)
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


def facts_of(checkpoint: Checkpoint) -> tuple[Facts, dict[str, Facts]]:
    """The facts of a model, and those of each of its quantised linears; engines.yaml says what they are."""
    config = checkpoint.config
    model: Facts = {"model_type": str(config.get("model_type")), "tied": bool(config.get("tie_word_embeddings"))}
    quantization = config.get("quantization_config")
    if not quantization:
        return {**model, "format": "dense", "schemes": 0}, {}
    if is_for_own_reader(quantization):
        packed = any(classify(name) == "embedding" for name in quantized_linears(checkpoint.index))
        return {**model, "format": "own", "packed_embedding": packed}, {}
    found = format_of(quantization) if isinstance(quantization, Mapping) else None
    try:
        schemes = {} if found is None else schemes_of(quantization, checkpoint.index)[1]
    except (IntegrityError, KeyError, TypeError):
        found, schemes = None, {}
    if found is None:
        return {**model, "format": "unknown"}, {}
    model |= {
        "format": found.name,
        "schemes": len(set(schemes.values())),
        "kv_cache": bool(quantization.get("kv_cache_scheme")),
        "act_order": quantization.get("quant_method") == GPTQ and bool(quantization.get("desc_act")),
        "experts": any(".experts." in name for name in schemes),
        "packed_embedding": any(classify(name) == "embedding" for name in schemes),
    }
    return model, {name: _linear(checkpoint, name, found.name, scheme) for name, scheme in schemes.items()}


def _linear(checkpoint: Checkpoint, name: str, format: str, scheme: Scheme) -> Facts:
    facts: Facts = {"expert": ".experts." in name, "bits": scheme.bits, "symmetric": scheme.symmetric}
    kind = classify(name)
    facts["place"] = str(kind) if kind in ("embedding", "head") else "block"
    facts["inputs"] = "none" if scheme.inputs is None else scheme.inputs.granularity
    if isinstance(scheme, IntScheme):
        facts |= {"kind": "int", "group_size": -1 if scheme.group_size is None else scheme.group_size}
    if isinstance(scheme, Fp8Scheme):
        facts |= {"kind": "fp8", "granularity": scheme.granularity}
    if isinstance(scheme, BlockFloatScheme):
        facts |= {"kind": scheme.name.lower().removesuffix("a16"), "group_size": scheme.group_size}
    if isinstance(scheme, NormalFloatScheme):
        facts |= {"kind": "nf4", "group_size": scheme.group_size}
    out, width = _shape(checkpoint, name, format, scheme)
    return facts | {"out_features": out, "in_features": width}


def _shape(checkpoint: Checkpoint, name: str, format: str, scheme: Scheme) -> tuple[int, int]:
    """(out, in) of a quantised linear, from the shapes of what it stores."""
    index = checkpoint.index
    if f"{name}.weight_shape" in index:
        out, width = checkpoint.read(f"{name}.weight_shape").tolist()
        return int(out), int(width)
    if f"{name}.qweight" in index:
        rows, columns = index[f"{name}.qweight"].shape
        return (columns * 8, rows) if format == "awq" else (columns, rows * 32 // scheme.bits)
    if f"{name}.weight_packed" in index:
        out, stored = index[f"{name}.weight_packed"].shape
        return out, stored * 8 // scheme.bits
    out, width = index[f"{name}.weight"].shape
    return out, width


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

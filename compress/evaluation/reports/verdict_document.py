"""A verdict as a report: what was decided and why, what turned wrong, on what it rests, and how to repeat it."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from compress.evaluation.policy import packaged_policies
from compress.evaluation.reports.document import Document, Picture, Section, Table
from compress.evaluation.reports.values import limit, measured, size
from compress.evaluation.reports.verbatim import Verbatim, one_line

if TYPE_CHECKING:
    from compress.evaluation.reports.plots import ForestRow
    from compress.evaluation.verdict import GateResult, Verdict

WORST = 5
_ORDER = ("FAIL", "INCONCLUSIVE", "SKIPPED", "WAIVED", "PASS")


def verdict_document(verdict: Verdict) -> Document:
    """The sections of a verdict; the gates that did not pass come first."""
    gates = sorted(verdict.gates, key=lambda gate: (not blocks(verdict, gate), _ORDER.index(gate.verdict)))
    sections = [
        Section(
            "Gates",
            picture=Picture(lambda: forest_svg(verdict), "each gate's estimate with its bounds beside its limit"),
            table=Table(
                ("gate", "against", ">estimate [bounds]", ">limit", "verdict", "role"),
                tuple((Verbatim(g.id), Verbatim(g.baseline), measured(g), limit(g), g.verdict, g.role) for g in gates),
            ),
        ),
        *_reasons(verdict, gates),
        *_worst(verdict),
        _basis(verdict),
        Section("How to repeat it", code=command(verdict), folded=True),
    ]
    names = " and ".join(f"{model.name} ({name})" for name, model in verdict.baselines.items())
    lead = f"against {names}, policy {verdict.policy}" + (f", profile {verdict.profile}" if verdict.profile else "")
    itself = (f"a model against itself; noise floor: {verdict.noise_floor()}",) if verdict.against_itself else ()
    counts = [f"{sum(g.verdict == v for g in gates)} {v}" for v in _ORDER if any(g.verdict == v for g in gates)]
    leads = (lead, f"{len(gates)} gates: {', '.join(counts)}", *itself)
    return Document(verdict.candidate.name, leads, tuple(sections), verdict.verdict)


def blocks(verdict: Verdict, gate: GateResult) -> bool:
    """Whether a gate keeps the candidate from passing: it did not pass, and the verdict does not list it as a mere
    warning."""
    if gate.verdict in ("PASS", "WAIVED") or (gate.verdict == "SKIPPED" and gate.role == "secondary"):
        return False
    return verdict.verdict != "PASS" and f"{gate.id}: {gate.message}" not in verdict.warnings


def forest_rows(verdict: Verdict) -> list[ForestRow]:
    """The gates as rows of the forest plot, in the policy's order; those that were not measured say so."""
    from compress.evaluation.reports.plots import ForestRow

    several = len(verdict.baselines) > 1
    return [
        ForestRow(
            label=f"{gate.id} ({gate.baseline})" if several else gate.id,
            kind=gate.kind,
            estimate=gate.estimate,
            low=gate.low,
            high=gate.high,
            limit=0.0 if gate.limit is None else gate.limit,
            rule=gate.rule,
            verdict=gate.verdict,
            text=gate.message if gate.estimate is None else f"{measured(gate)} {limit(gate)}",
            secondary=gate.role == "secondary",
        )
        for gate in verdict.gates
    ]


def forest_svg(verdict: Verdict) -> bytes:
    """The forest plot of a verdict."""
    from compress.evaluation.reports.plots import forest, svg

    return svg(forest(forest_rows(verdict)))


def command(verdict: Verdict) -> str:
    """The command line that makes this verdict again; models and policy are named as the verdict knows them."""
    words = ["compress", "gate", verdict.candidate.name]
    for name, model in verdict.baselines.items():
        words += ["--baseline", f"{name}={model.name}"]
    policy = verdict.policy if verdict.policy in packaged_policies() else f"{verdict.policy}.toml"
    return shlex.join([one_line(word) for word in [*words, "--policy", policy]])


def _reasons(verdict: Verdict, gates: list[GateResult]) -> list[Section]:
    rows = tuple((Verbatim(g.id), g.verdict, one_line(g.message, 400)) for g in gates if g.verdict != "PASS")
    found = [Section("Why", table=Table(("gate", "verdict", "reason"), rows))] if rows else []
    said = {f"{gate.id}: {gate.message}" for gate in gates}
    if others := tuple((one_line(line, 400),) for line in verdict.warnings if line not in said):
        found.append(Section("Warnings", table=Table(("what did not block",), others), folded=True))
    return found


def _worst(verdict: Verdict) -> list[Section]:
    """Items that turned wrong, as many of each task as the limit allows in turn."""
    by_task: dict[str, list[tuple[str, ...]]] = {}
    for item in verdict.worst:
        row = (Verbatim(item.task), Verbatim(one_line(item.item_id, 80)), Verbatim(item.cluster or ""))
        by_task.setdefault(item.task, []).append((*row, Verbatim(item.baseline)))
    longest = max((len(rows) for rows in by_task.values()), default=0)
    turns = [rows[k] for k in range(longest) for rows in by_task.values() if k < len(rows)][:WORST]
    if not turns:
        return []
    heading = "Items that turned wrong" + (f" ({len(turns)} of {len(verdict.worst)} in the JSON)" if turns else "")
    return [Section(heading, table=Table(("task", "item", "group", "right before, in"), tuple(turns)))]


def _basis(verdict: Verdict) -> Section:
    machine = verdict.environment
    facts: list[tuple[str, str]] = [("decided", f"{verdict.created.isoformat()}, risk {verdict.alpha:g} per gate")]
    if verdict.looks > 1:
        facts.append(("looks", f"{verdict.look} of {verdict.looks}, {verdict.alpha_per_look:.4g} of the risk each"))
    facts.append(("candidate", Verbatim(f"{verdict.candidate.digest[:16]}, {size(verdict.candidate.weights_bytes)}")))
    facts += [
        (f"baseline {name}", Verbatim(f"{model.digest[:16]}, {size(model.weights_bytes)}"))
        for name, model in verdict.baselines.items()
    ]
    facts += [
        (f"text {text.name}", f"{text.tokens} tokens in {text.clusters} {text.cluster_kind}") for text in verdict.texts
    ]
    facts += [
        ("computed by", f"{machine.runtime}, {machine.kernel} {machine.dtype} on {machine.device}, {machine.machine}"),
        ("noise floor", verdict.noise_floor()),
        ("policy", Verbatim(verdict.policy_sha256[:16])),
        ("evaluation code", Verbatim(f"{verdict.code.version} {verdict.code.sha256[:16]}")),
        ("verdict", Verbatim(verdict.sha256[:16])),
    ]
    return Section("What it rests on", facts=tuple(facts), folded=True)

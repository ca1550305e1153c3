"""A verdict as JUnit XML, the form in which CI systems show tests: one test case per gate.

What blocked is a `failure` (the limit is surely broken) or an `error` (it could not be told); what was excused,
waived or not measured is `skipped`. A verdict that is not PASS always has a failure or an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree

from compress.evaluation.reports.values import limit, measured
from compress.evaluation.reports.verbatim import one_line, xml_text
from compress.evaluation.reports.verdict_document import blocks

if TYPE_CHECKING:
    from compress.evaluation.verdict import GateResult, Verdict

_MESSAGE = 2000
_BLOCKING = {
    "FAIL": ("failure", "GateFailure"),
    "INCONCLUSIVE": ("error", "Inconclusive"),
    "SKIPPED": ("error", "NotMeasured"),
}


def render(verdict: Verdict) -> bytes:
    """The file's bytes: UTF-8, well-formed whatever the names hold, without times but the verdict's own date."""
    cases = [_case(verdict, gate) for gate in verdict.gates]
    counts = {"tests": len(cases)}
    for plural, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        counts[plural] = sum(case.find(tag) is not None for case in cases)
    if verdict.verdict != "PASS" and not counts["failures"] + counts["errors"]:
        case = ElementTree.Element("testcase", {"classname": "gates", "name": "verdict", "time": "0"})
        _answer(case, "error", verdict.verdict, f"the verdict is {verdict.verdict}")
        cases.append(case)
        counts["tests"], counts["errors"] = counts["tests"] + 1, 1
    shared = {name: str(count) for name, count in counts.items()} | {"time": "0"}
    root = ElementTree.Element("testsuites", {"name": "compress", **shared})
    suite = ElementTree.SubElement(
        root,
        "testsuite",
        {"name": "compress.gates", "hostname": "localhost", "timestamp": f"{verdict.created}T00:00:00", **shared},
    )
    suite.append(_properties(verdict))
    suite.extend(cases)
    out = ElementTree.SubElement(suite, "system-out")
    out.text = xml_text("\n".join(verdict.warnings))
    ElementTree.SubElement(suite, "system-err")
    ElementTree.indent(root, " ")
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"


def _case(verdict: Verdict, gate: GateResult) -> ElementTree.Element:
    name = gate.id if len(verdict.baselines) == 1 else f"{gate.id} ({gate.baseline})"
    case = ElementTree.Element("testcase", {"classname": f"gates.{gate.kind}", "name": one_line(name), "time": "0"})
    message = f"{measured(gate)}, limit {limit(gate)}: {gate.message}"
    if blocks(verdict, gate):
        tag, kind = _BLOCKING[gate.verdict]
        _answer(case, tag, kind, message)
    elif gate.verdict != "PASS":
        excuse = "" if gate.verdict in ("WAIVED", "SKIPPED") else "does not block, "
        skipped = ElementTree.SubElement(case, "skipped")
        skipped.set("message", one_line(f"{excuse}{gate.verdict}: {gate.waiver or ''} {message}", _MESSAGE))
    return case


def _answer(case: ElementTree.Element, tag: str, kind: str, message: str) -> None:
    found = ElementTree.SubElement(case, tag, {"type": kind, "message": one_line(message, _MESSAGE)})
    found.text = xml_text(message)


def _properties(verdict: Verdict) -> ElementTree.Element:
    """What the verdict rests on, as name and value."""
    values = {
        "verdict": verdict.verdict,
        "candidate": verdict.candidate.name,
        "candidate.digest": verdict.candidate.digest,
        "policy": verdict.policy,
        "policy.sha256": verdict.policy_sha256,
        "noise.floor": verdict.noise_floor(),
        "verdict.sha256": verdict.sha256,
    }
    for name, model in verdict.baselines.items():
        values |= {f"baseline.{name}": model.name, f"baseline.{name}.digest": model.digest}
    element = ElementTree.Element("properties")
    for name, text in values.items():
        ElementTree.SubElement(element, "property", {"name": one_line(name), "value": one_line(text)})
    return element

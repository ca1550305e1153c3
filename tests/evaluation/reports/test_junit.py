"""JUnit XML: valid against the schema that CI systems share, whatever names hold, and never green for what is not."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from compress.evaluation.reports import junit
from compress.evaluation.verdict import GateResult
from tests.evaluation.reports.made import NASTY, accuracy, gate, mixed, verdict

XSD = """<?xml version="1.0"?>
<xs:schema xmlns:xs="http://www.w3.org/2001/XMLSchema" elementFormDefault="qualified">
  <xs:complexType name="answer"><xs:simpleContent><xs:extension base="xs:string">
    <xs:attribute name="message" type="xs:string"/>
    <xs:attribute name="type" type="xs:string" use="required"/>
  </xs:extension></xs:simpleContent></xs:complexType>
  <xs:complexType name="skipped"><xs:attribute name="message" type="xs:string"/></xs:complexType>
  <xs:attributeGroup name="counts">
    <xs:attribute name="name" type="xs:token" use="required"/>
    <xs:attribute name="tests" type="xs:nonNegativeInteger" use="required"/>
    <xs:attribute name="failures" type="xs:nonNegativeInteger" use="required"/>
    <xs:attribute name="errors" type="xs:nonNegativeInteger" use="required"/>
    <xs:attribute name="skipped" type="xs:nonNegativeInteger"/>
    <xs:attribute name="time" type="xs:decimal" use="required"/>
  </xs:attributeGroup>
  <xs:element name="testsuites"><xs:complexType>
    <xs:sequence><xs:element ref="testsuite" minOccurs="0" maxOccurs="unbounded"/></xs:sequence>
    <xs:attributeGroup ref="counts"/>
  </xs:complexType></xs:element>
  <xs:element name="testsuite"><xs:complexType>
    <xs:sequence>
      <xs:element name="properties"><xs:complexType><xs:sequence>
        <xs:element name="property" minOccurs="0" maxOccurs="unbounded"><xs:complexType>
          <xs:attribute name="name" use="required"><xs:simpleType>
            <xs:restriction base="xs:token"><xs:minLength value="1"/></xs:restriction>
          </xs:simpleType></xs:attribute>
          <xs:attribute name="value" type="xs:string" use="required"/>
        </xs:complexType></xs:element>
      </xs:sequence></xs:complexType></xs:element>
      <xs:element name="testcase" minOccurs="0" maxOccurs="unbounded"><xs:complexType>
        <xs:choice minOccurs="0">
          <xs:element name="skipped" type="skipped"/>
          <xs:element name="error" type="answer"/>
          <xs:element name="failure" type="answer"/>
        </xs:choice>
        <xs:attribute name="name" type="xs:token" use="required"/>
        <xs:attribute name="classname" type="xs:token" use="required"/>
        <xs:attribute name="time" type="xs:decimal" use="required"/>
      </xs:complexType></xs:element>
      <xs:element name="system-out" type="xs:string"/>
      <xs:element name="system-err" type="xs:string"/>
    </xs:sequence>
    <xs:attributeGroup ref="counts"/>
    <xs:attribute name="hostname" type="xs:token" use="required"/>
    <xs:attribute name="timestamp" type="xs:dateTime" use="required"/>
  </xs:complexType></xs:element>
</xs:schema>"""
"""The shape that CI systems read: Ant's JUnit report with `skipped`, as Surefire, Jenkins and GitLab know it."""

TAGS = (("tests", "testcase"), ("failures", "failure"), ("errors", "error"), ("skipped", "skipped"))


def problems(data: bytes) -> list[str]:
    """What the schema has against a document; lxml shares nothing with the writer."""
    schema = etree.XMLSchema(etree.fromstring(XSD.encode()))
    document = etree.fromstring(data)
    found = [] if schema.validate(document) else [str(error) for error in schema.error_log]
    for suite in (document, *document.iter("testsuite")):
        for plural, tag in TAGS:
            if int(suite.get(plural)) != len(list(suite.iter(tag))):
                found.append(f"{plural} is not the number of {tag} elements")
    return found


def cases(data: bytes) -> dict[str, tuple[str, str]]:
    """Name of the test case -> (element, type) of its answer; ("", "") for one that passed."""
    found = {}
    for case in ElementTree.fromstring(data).iter("testcase"):
        answer = next(iter(case), None)
        found[case.attrib["name"]] = ("", "") if answer is None else (answer.tag, answer.get("type", ""))
    return found


def test_every_verdict_has_its_element() -> None:
    data = junit.render(mixed())
    assert problems(data) == []
    assert cases(data) == {
        "size (root)": ("", ""),
        "perplexity (root)": ("", ""),
        "kl (root)": ("failure", "GateFailure"),
        "top1 (root)": ("", ""),
        "lambada (last)": ("error", "Inconclusive"),
        "tail (root)": ("skipped", ""),
        "decode (root)": ("skipped", ""),
        "memory (root)": ("skipped", ""),
    }
    suite = ElementTree.fromstring(data).find("testsuite")
    assert suite is not None
    counts = [suite.get(name) for name in ("tests", "failures", "errors", "skipped", "timestamp")]
    assert counts == ["8", "1", "1", "3", "2026-11-21T00:00:00"]
    failure = suite.find(".//failure")
    assert failure is not None
    assert failure.get("message") == "0.031 [0.028, 0.034] nats, limit ≤ 0.02 nats: kl says FAIL"


def test_what_is_waived_says_until_when() -> None:
    skipped = ElementTree.fromstring(junit.render(mixed())).findall(".//skipped")
    messages = [element.get("message", "") for element in skipped]
    assert messages[0].startswith("does not block, FAIL")
    assert "until 2027-01-01: issue 42" in messages[2]


def test_a_single_baseline_needs_no_name() -> None:
    assert set(cases(junit.render(verdict(gate("kl"))))) == {"kl"}


@pytest.mark.parametrize(
    ("gates", "outcome", "expected"),
    [
        ([gate("a", "INCONCLUSIVE")], "FAIL", ("error", "Inconclusive")),
        ([gate("a", "SKIPPED")], "INCONCLUSIVE", ("error", "NotMeasured")),
        ([gate("a", "SKIPPED", role="secondary")], "PASS", ("skipped", "")),
        ([gate("a", "PASS")], "PASS", ("", "")),
    ],
)
def test_what_could_not_be_told_is_an_error(gates: list[GateResult], outcome: str, expected: tuple[str, str]) -> None:
    data = junit.render(verdict(*gates, outcome=outcome))
    assert problems(data) == []
    assert cases(data)["a"] == expected


def test_what_the_policy_lets_pass_is_no_failure() -> None:
    """`on_inconclusive = "warn"`: the verdict is PASS and the open gate is among the warnings."""
    data = junit.render(verdict(gate("a", "INCONCLUSIVE"), outcome="PASS", warnings=["a: a says INCONCLUSIVE"]))
    assert cases(data)["a"][0] == "skipped"


def test_a_secondary_gate_that_blocks_is_a_failure() -> None:
    """A policy may let secondary failures block; then they are not among the warnings."""
    blocked = verdict(gate("a"), gate("b", "FAIL", role="secondary"), outcome="FAIL", warnings=[])
    assert cases(junit.render(blocked))["b"] == ("failure", "GateFailure")


VERDICTS = st.sampled_from(["PASS", "FAIL", "INCONCLUSIVE", "WAIVED", "SKIPPED"])
ROLES = st.sampled_from(["primary", "secondary"])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(VERDICTS, ROLES, st.booleans()), min_size=1, max_size=5),
    st.sampled_from(["PASS", "FAIL", "INCONCLUSIVE"]),
)
def test_only_a_pass_is_green(given_gates: list[tuple[str, str, bool]], outcome: str) -> None:
    gates = [gate(f"g{i}", each, role=role) for i, (each, role, _) in enumerate(given_gates)]
    warned = [f"{g.id}: {g.message}" for g, (_, _, listed) in zip(gates, given_gates, strict=True) if listed]
    data = junit.render(verdict(*gates, outcome=outcome, warnings=warned))
    assert problems(data) == []
    root = ElementTree.fromstring(data)
    red = int(root.attrib["failures"]) + int(root.attrib["errors"])
    assert (red > 0) is (outcome != "PASS")


def test_names_from_outside_cannot_break_it() -> None:
    base = verdict(gate("kl", "FAIL", message=NASTY, baseline=NASTY), accuracy("b", 0.0, baseline="x"))
    candidate = base.candidate.model_copy(update={"name": NASTY})
    named = base.model_copy(update={"candidate": candidate, "policy": NASTY, "warnings": [NASTY, "\x00\x0b"]})
    data = junit.render(named)
    assert problems(data) == []
    values = {e.get("name"): e.get("value") for e in ElementTree.fromstring(data).iter("property")}
    assert "alert" in str(values["candidate"])
    assert "\x1b" not in data.decode()
    assert junit.render(named) == data


@pytest.mark.parametrize(
    "damage",
    [
        (b'type="GateFailure" ', b""),
        (b' timestamp="2026-11-21T00:00:00"', b' timestamp="yesterday"'),
        (b'tests="8"', b'tests="7"'),
        (b'classname="gates.kl_mean" ', b""),
        (b"<system-err />", b""),
    ],
)
def test_the_schema_can_refuse(damage: tuple[bytes, bytes]) -> None:
    data = junit.render(mixed())
    assert damage[0] in data
    assert problems(data.replace(*damage)) != []

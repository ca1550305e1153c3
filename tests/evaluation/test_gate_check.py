"""`gate --check`: a verdict counts if it follows from its records or is signed, and only as of today."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from compress.errors import IntegrityError, UserError
from compress.evaluation.gate import check, decide_release
from compress.evaluation.gating import check as checking
from compress.evaluation.gating.consistency import contradiction, expired
from compress.evaluation.gating.evidence import evidence_path, find_evidence, write_evidence
from compress.evaluation.policy import Policy
from compress.evaluation.records import EvalRecord, write_record
from compress.evaluation.verdict import GateResult, Verdict, read_verdict, write_verdict
from tests.evaluation.gate_records import model, record, task, text

DAY = datetime.date(2026, 10, 30)
LATER = datetime.date(2026, 11, 2)
PASSES = {"id": "kl", "kind": "kl_mean", "max": 0.0205}
OPEN = {"id": "open", "kind": "kl_mean", "max": 0.0201}
FAILS = {"id": "bad", "kind": "kl_mean", "max": 0.0195}
TASK = {"id": "task", "kind": "accuracy_paired", "task": "task", "margin": 5.0}
WAIVER = {"gate": "bad", "until": datetime.date(2026, 11, 1), "reason": "issue 42"}


def policy(*gates: dict[str, Any], **changed: Any) -> Policy:
    return Policy.model_validate({"version": 1, "gate": list(gates), **changed})


def made(directory: Path, rules: Policy, *, evidence: bool = True, today: datetime.date = DAY) -> Path:
    """verdict.json of a record by these rules; the record itself is not left there."""
    directory.mkdir(exist_ok=True)
    source = directory / "eval.json"
    write_record(record(tasks=[task(700, 260, 20, 20)]), source)
    done = decide_release(source, policy=rules, today=today)
    source.unlink()
    path = directory / "verdict.json"
    write_verdict(done.verdict, path)
    if evidence:
        write_evidence(path, done.policy, done.records)
    return path


def forged(path: Path, **changed: Any) -> Path:
    """The same file with other contents and a renewed hash."""
    write_verdict(read_verdict(path).model_copy(update=changed).sealed(), path)
    return path


def passing(verdict: Verdict) -> dict[str, Any]:
    """Every gate and the verdict set to PASS."""
    return {"verdict": "PASS", "gates": [gate.model_copy(update={"verdict": "PASS"}) for gate in verdict.gates]}


def test_a_verdict_is_derived_from_what_lies_beside_it(tmp_path: Path) -> None:
    for rules, code in ((policy(PASSES, TASK), 0), (policy(PASSES, FAILS), 1), (policy(PASSES, OPEN), 3)):
        path = made(tmp_path, rules)
        done = check(path, today=LATER)
        assert (done.verdict, done.derived, done.verdict.exit_code) == (read_verdict(path), True, code)
        assert check(path, policy=rules, today=LATER) == done
    with pytest.raises(IntegrityError, match="with other contents than"):
        check(path, policy=policy(PASSES), today=LATER)


def test_a_forged_verdict_is_refused_with_and_without_its_records(tmp_path: Path) -> None:
    path = made(tmp_path, policy(PASSES, FAILS))
    forged(path, **passing(read_verdict(path)))
    with pytest.raises(IntegrityError, match="contradicts itself: the gate bad cannot be PASS"):
        check(path, today=DAY)
    numbers = [gate.model_copy(update={"estimate": 0.0, "low": 0.0, "high": 0.0}) for gate in read_verdict(path).gates]
    forged(path, gates=numbers)
    with pytest.raises(IntegrityError, match="does not follow from the records"):
        check(path, today=DAY)
    evidence_path(path).unlink()
    with pytest.raises(IntegrityError, match="anyone can write such a file") as refused:
        check(path, today=DAY)
    assert "--check VERDICT --policy FILE" in str(refused.value.hint)


def test_without_records_nothing_passes_that_is_not_signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = made(tmp_path, policy(PASSES), evidence=False)
    with pytest.raises(IntegrityError, match="the policy 'policy' that decided it is not here"):
        check(honest, today=DAY)
    with pytest.raises(IntegrityError, match=r"the records that it rests on \(baseline\) are not here"):
        check(honest, policy=policy(PASSES), today=DAY)
    monkeypatch.setattr("compress.evaluation.gating.signing.verify", lambda *_: "release@example.org")
    signed = check(honest, allowed_signers="signers", today=DAY)
    assert (signed.signer, signed.derived, signed.verdict.exit_code) == ("release@example.org", False, 0)
    forged(honest, verdict="FAIL")
    with pytest.raises(IntegrityError, match="its gates cannot give FAIL"):
        check(honest, allowed_signers="signers", today=DAY)


@pytest.mark.parametrize("field", sorted(set(Verdict.model_fields) - checking.OWN_WORD - {"schema_version", "kind"}))
def test_no_field_can_be_changed(field: str, tmp_path: Path) -> None:
    path = made(tmp_path, policy(PASSES, TASK, FAILS))
    verdict = read_verdict(path)
    environment = verdict.environment.model_copy(update={"device": "cuda"})
    changed: dict[str, Any] = {
        "verdict": "INCONCLUSIVE",
        "policy": "release",
        "policy_sha256": "a" * 64,
        "profile": "loose",
        "alpha": 0.2,
        "alpha_per_look": 0.2,
        "look": 2,
        "looks": 2,
        "candidate": model("elder"),
        "baselines": {"baseline": model("elder")},
        "texts": [],
        "environment": environment,
        "gates": verdict.gates[:1],
        "worst": [],
        "records": {"baseline": "b" * 64},
    }
    assert changed[field] != getattr(verdict, field)
    forged(path, **{field: changed[field]})
    with pytest.raises(IntegrityError):
        check(path, today=DAY)


def test_warnings_cannot_be_changed_either(tmp_path: Path) -> None:
    path = made(tmp_path, policy(PASSES, {**FAILS, "role": "secondary"}))
    assert read_verdict(path).warnings
    forged(path, warnings=[])
    with pytest.raises(IntegrityError, match="`warnings` would be another"):
        check(path, today=DAY)


def test_an_expired_waiver_is_not_revived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path, policy(PASSES, FAILS, waiver=[WAIVER]))
    assert read_verdict(path).verdict == "PASS"
    assert check(path, today=datetime.date(2026, 11, 1)).verdict.exit_code == 0
    derived = check(path, today=LATER)
    assert (derived.verdict.exit_code, derived.verdict.created) == (1, LATER)
    assert "its waiver has expired" in derived.verdict.gates[1].message
    evidence_path(path).unlink()
    monkeypatch.setattr("compress.evaluation.gating.signing.verify", lambda *_: "release@example.org")
    assert check(path, allowed_signers="signers", today=DAY).verdict.exit_code == 0
    signed = check(path, allowed_signers="signers", today=LATER).verdict
    assert (signed.exit_code, signed.gates[1].verdict, signed.sha256) == (1, "FAIL", signed.expected_sha256())


def kept(tmp_path: Path) -> tuple[Path, EvalRecord]:
    path = made(tmp_path, policy(PASSES, name="kept"), evidence=False)
    return path, record(tasks=[task(700, 260, 20, 20)])


def test_an_eval_file_and_a_policy_beside_it_are_found_by_their_hashes(tmp_path: Path) -> None:
    path, source = kept(tmp_path)
    (tmp_path / "broken.toml").write_text("no = [")
    (tmp_path / "p.toml").write_text(
        'version = 1\nname = "kept"\n[[gate]]\nid = "kl"\nkind = "kl_mean"\nmax = 0.0205\n'
    )
    (tmp_path / "other.json").write_text("[]")
    write_record(record(texts=[text(kl=0.001)]), tmp_path / "a.json")
    write_record(source, tmp_path / "some.eval.json")
    done = check(path, today=LATER)
    assert (done.derived, done.records) == (True, (source,))
    assert check(path, tmp_path / "some.eval.json", today=LATER) == done
    with pytest.raises(IntegrityError, match="would be another"):
        check(path, tmp_path / "a.json", today=LATER)
    with pytest.raises(UserError, match="a baseline alone"):
        check(path, baseline=tmp_path / "a.json", today=LATER)


def test_several_baselines_and_records_made_alone_are_kept(tmp_path: Path) -> None:
    write_record(record(texts=[text(log_ratio=0.021)]), tmp_path / "now.json")
    write_record(record(model=model("earlier", 500, "w4a16-g128")), tmp_path / "last.json")
    write_record(record(model=model("baseline"), baseline=None, texts=[text(alone=True)]), tmp_path / "root.json")
    rules = policy(
        PASSES, {"id": "drift", "kind": "kl_increase", "max_increase": 0.1, "baseline": "last", "role": "secondary"}
    )
    sides = {"root": tmp_path / "root.json", "last": tmp_path / "last.json"}
    done = decide_release(tmp_path / "now.json", sides, rules, today=DAY)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = elsewhere / "v.json"
    write_verdict(done.verdict, path)
    write_evidence(path, done.policy, done.records)
    assert set(done.verdict.records) == {"root", "last", "last alone"}
    assert check(path, today=LATER).verdict == done.verdict


def test_damaged_evidence_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path, policy(PASSES))
    whole = evidence_path(path).read_bytes()
    found = find_evidence(path, read_verdict(path))
    assert (found.policy, len(found.records)) == (policy(PASSES), 1)
    for damaged in (whole[:-30], b"", b"not gzip", whole[:40] + b"\0" + whole[41:]):
        evidence_path(path).write_bytes(damaged)
        with pytest.raises(IntegrityError, match="is damaged"):
            check(path, today=DAY)


def test_what_extend_adds_is_known(tmp_path: Path) -> None:
    path = made(tmp_path, policy(OPEN, on_inconclusive="extend"))
    assert read_verdict(path).warnings == [checking.NO_MORE_TO_READ]
    assert check(path, today=LATER).verdict.exit_code == 3
    forged(path, warnings=["all is well"])
    with pytest.raises(IntegrityError, match="`warnings` would be another"):
        check(path, today=LATER)


def test_gates_follow_from_their_bounds(tmp_path: Path) -> None:
    verdict = read_verdict(made(tmp_path, policy(PASSES, OPEN, FAILS, TASK)))
    assert contradiction(verdict) is None

    def with_gate(index: int, **changed: Any) -> str | None:
        gates = [*verdict.gates]
        gates[index] = GateResult.model_validate({**gates[index].model_dump(), **changed})
        return contradiction(verdict.model_copy(update={"gates": gates}))

    for index, verdicts in ((0, ("FAIL", "SKIPPED", "WAIVED")), (1, ("PASS", "FAIL")), (2, ("PASS", "INCONCLUSIVE"))):
        for wrong in verdicts:
            assert with_gate(index, verdict=wrong) is not None
    assert with_gate(3, rule="at most") is not None  # accuracy has to stay above its limit
    assert with_gate(0, limit=None) is not None
    assert with_gate(0, high=None) is not None
    assert with_gate(0, baseline="other") is not None
    assert with_gate(2, verdict="WAIVED") is not None  # no waiver is named
    assert with_gate(2, verdict="WAIVED", waiver="until 2026-10-29: x") is not None  # it had expired then
    assert with_gate(2, verdict="WAIVED", waiver="until some day: x") is not None
    assert with_gate(2, verdict="WAIVED", waiver="until 2026-10-30: x") is None
    only = verdict.model_copy(update={"gates": verdict.gates[:2], "verdict": "PASS"})
    assert contradiction(only) is not None  # open, and no warning says so
    assert contradiction(only.model_copy(update={"warnings": ["open: y"]})) is None
    assert contradiction(only.model_copy(update={"gates": [], "verdict": "PASS"})) is not None
    assert expired(verdict, datetime.date(2030, 1, 1)) == verdict


def test_a_skipped_primary_gate_cannot_have_passed(tmp_path: Path) -> None:
    below = record(tasks=[task(250, 750, 0, 0, why_not="not above chance")])
    write_record(below, tmp_path / "eval.json")
    done = decide_release(tmp_path / "eval.json", policy=policy(PASSES, TASK, on_inconclusive="warn"), today=DAY)
    assert done.verdict.verdict == "INCONCLUSIVE"
    assert contradiction(done.verdict) is None
    assert contradiction(done.verdict.model_copy(update={"verdict": "PASS"})) is not None

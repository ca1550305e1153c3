"""Checks a verdict that was made elsewhere: derives it again from its records, and holds its waivers against today.

What a file says of itself proves nothing, its own hash included: whoever can write the file can write the hash. So a
verdict counts if it follows from records, or if somebody who may release has signed it. Free of torch.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from compress.errors import IntegrityError, UserError
from compress.evaluation.gating.comparable import compare
from compress.evaluation.gating.comparison import Comparison
from compress.evaluation.gating.consistency import contradiction, expired
from compress.evaluation.gating.decide import Look, decide
from compress.evaluation.gating.evidence import Evidence, find_evidence
from compress.evaluation.gating.noise import refuse_below_noise
from compress.evaluation.gating.scoring import Scoring
from compress.evaluation.gating.sources import Gathered, check_data, gather
from compress.evaluation.policy import Policy
from compress.evaluation.records import EvalRecord
from compress.evaluation.verdict import Verdict, read_verdict

NO_MORE_TO_READ = "cannot be extended: records hold no more than they hold; give the models to score more"
NO_MORE_TO_SCORE = "still open after all there is was scored"

OWN_WORD = frozenset({"sha256", "created", "code", "noise", "warnings"})
"""Fields that records and policy do not give, or that are compared apart; every other one is derived again."""

_AGAIN = "it was made from other records, by another version, or by hand: run `compress gate` again"


@dataclass(frozen=True, slots=True)
class Checked:
    """A verdict as it stands today. `signer`: who signed it, where that was asked.

    `policy` and `records` are those that it was derived from; None and empty where it was not, and only the signature
    vouches for it.
    """

    verdict: Verdict
    signer: str | None
    policy: Policy | None
    records: tuple[EvalRecord, ...]

    @property
    def derived(self) -> bool:
        """Whether it follows from its records."""
        return self.policy is not None


def check_verdict(
    path: Path,
    candidate: str | Path | None,
    baselines: Mapping[str, str | Path],
    policy: Policy | None,
    signer: str | None,
    today: datetime.date,
) -> Checked:
    """See `compress.evaluation.gate.check`."""
    verdict = read_verdict(path)
    if (wrong := contradiction(verdict)) is not None:
        raise IntegrityError(f"{path} contradicts itself: {wrong}", _AGAIN)
    if policy is not None and policy.sha256() != verdict.policy_sha256:
        raise IntegrityError(
            f"{path} was decided by the policy {verdict.policy!r} with other contents than {policy.name!r} has",
            "give the --policy that it was decided by",
        )
    if candidate is None and baselines:
        raise UserError("a baseline alone derives no verdict again", "give the candidate's eval.json too")
    beside = find_evidence(path, verdict)
    rules = policy or beside.policy
    missing = _missing(verdict, rules, beside, candidate)
    if missing is not None and (signer is None or candidate is not None):
        raise IntegrityError(
            f"{path} cannot be checked: its hash holds and its gates agree with each other, but {missing} not here, "
            "and anyone can write such a file",
            "give what it rests on: compress gate CANDIDATE --check VERDICT --policy FILE; or, for a signed one, "
            "--allowed-signers FILE",
        )
    if missing is not None or rules is None:
        return Checked(expired(verdict, today), signer, None, ())
    if candidate is None:
        gathered = _from_evidence(path, verdict, rules, beside)
    else:
        gathered = gather(candidate, baselines, rules, Scoring(), may_score=False)
    return Checked(_derive(path, verdict, rules, gathered, today), signer, rules, gathered.records())


def _missing(verdict: Verdict, rules: Policy | None, beside: Evidence, candidate: str | Path | None) -> str | None:
    if rules is None:
        return f"the policy {verdict.policy!r} that decided it is"
    if candidate is None and (lost := [name for name, sha in verdict.records.items() if sha not in beside.records]):
        return f"the records that it rests on ({', '.join(lost)}) are"
    return None


def _from_evidence(path: Path, verdict: Verdict, policy: Policy, beside: Evidence) -> Gathered:
    """The comparisons that the verdict names, from records found by their hashes."""
    found: dict[str, Comparison] = {}
    for name in verdict.baselines:
        other = verdict.records.get(f"{name} alone")
        alone = None if other is None else beside.records[other]
        record = beside.records[verdict.records[name]]
        found[name] = compare(record, alone, name=name, allow_identical=policy.allow_identical)
    first = next(iter(found.values()))
    if any(each.candidate != first.candidate for each in found.values()):
        raise IntegrityError(f"{path} rests on records of several candidates", _AGAIN)
    return Gathered(found, _text(first.record, policy), scored=False)


def _text(record: EvalRecord, policy: Policy) -> str | None:
    """The name of the policy's text. A policy that extends may have been decided on a share of all there is."""
    looks = policy.looks if policy.on_inconclusive == "extend" else 1
    for step in range(1, looks):
        try:
            return check_data(record, policy, step / looks)
        except IntegrityError:
            continue
    return check_data(record, policy, 1.0)


def _derive(path: Path, verdict: Verdict, policy: Policy, gathered: Gathered, today: datetime.date) -> Verdict:
    """Raises IntegrityError unless the verdict is what its records gave on its day; returns what they give today."""
    looks = policy.looks if policy.on_inconclusive == "extend" else 1
    look = Look(verdict.look, looks)

    def decided(day: datetime.date) -> Verdict:
        return decide(gathered.comparisons, policy, text=gathered.text, look=look, noise=verdict.noise, today=day)

    then = decided(verdict.created)
    for field in Verdict.model_fields:
        if field not in OWN_WORD and getattr(then, field) != getattr(verdict, field):
            raise _does_not_follow(path, field)
    if not _same_warnings(then, verdict, policy):
        raise _does_not_follow(path, "warnings")
    if verdict.noise is not None:
        if verdict.noise.digest != verdict.baseline.digest:
            raise _does_not_follow(path, "noise")
        refuse_below_noise(policy.for_scheme(verdict.candidate.scheme)[1], verdict.noise)
    now = decided(today)
    return verdict if (now.verdict, now.gates) == (verdict.verdict, verdict.gates) else now


def _same_warnings(then: Verdict, verdict: Verdict, policy: Policy) -> bool:
    """An open verdict of a policy that extends says in addition why it went no further."""
    if then.warnings == verdict.warnings:
        return True
    extended = policy.on_inconclusive == "extend" and verdict.verdict == "INCONCLUSIVE"
    return extended and any(verdict.warnings == [*then.warnings, end] for end in (NO_MORE_TO_READ, NO_MORE_TO_SCORE))


def _does_not_follow(path: Path, field: str) -> IntegrityError:
    return IntegrityError(f"{path} does not follow from the records: its `{field}` would be another", _AGAIN)

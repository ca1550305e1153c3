"""What a verdict rests on, kept beside it: the policy and the eval records, so that it can be derived again anywhere.

`VERDICT.records.json.gz` beside `VERDICT.json` holds both. Whatever is found is known by its hash in the verdict, so it
may also be a plain eval.json or a policy's TOML in the same directory, or a packaged policy. Free of torch.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress.artifact import durable
from compress.errors import CompressError, IntegrityError
from compress.evaluation.policy import Policy, load_policy, packaged_policies
from compress.evaluation.records import EvalRecord, parse_record
from compress.evaluation.verdict import Verdict

_KIND = "compress.evidence"
_HINT = "fetch it anew, or run `compress gate` again with --output"


@dataclass(frozen=True, slots=True)
class Evidence:
    """The policy of a verdict, and its eval records by their hash; None and absent where they are not there."""

    policy: Policy | None
    records: dict[str, EvalRecord]


def evidence_path(verdict: Path) -> Path:
    """Where the evidence of a verdict file lies."""
    return verdict.with_name(f"{verdict.name.removesuffix('.json')}.records.json.gz")


def write_evidence(verdict: Path, policy: Policy, records: Iterable[EvalRecord]) -> Path:
    """Writes the evidence of a verdict file beside it; equal evidence gives equal bytes. Raises WorkError."""
    document = {
        "schema_version": 1,
        "kind": _KIND,
        "policy": policy.model_dump(mode="json"),
        "records": [record.to_bytes().decode() for record in records],
    }
    target = evidence_path(verdict)
    durable.write_atomic(target, gzip.compress(json.dumps(document, ensure_ascii=False).encode(), mtime=0))
    return target


def find_evidence(path: Path, verdict: Verdict) -> Evidence:
    """What there is beside a verdict file of the policy and the records that it names.

    Raises:
        IntegrityError: the evidence file, or a record that the verdict names, is damaged or was edited.
    """
    policy, records = _kept(evidence_path(path), verdict)
    if policy is None:
        policy = _policy_beside(path.parent, verdict)
    for file in sorted(path.parent.glob("*.json")):
        if missing := set(verdict.records.values()) - set(records):
            records |= _record_in(file, missing)
    return Evidence(policy, records)


def _kept(file: Path, verdict: Verdict) -> tuple[Policy | None, dict[str, EvalRecord]]:
    if not file.is_file():
        return None, {}
    try:
        document: dict[str, Any] = json.loads(gzip.decompress(file.read_bytes()))
        if document["kind"] != _KIND:
            raise ValueError(document["kind"])
        policy = Policy.model_validate_json(json.dumps(document["policy"]))
        records = [parse_record(text.encode(), str(file)) for text in document["records"]]
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError, ValidationError):
        raise IntegrityError(f"{file} is damaged: it is no whole evidence of a verdict", _HINT) from None
    wanted = set(verdict.records.values())
    found = {record.sha256: record for record in records if record.sha256 in wanted}
    return (policy if policy.sha256() == verdict.policy_sha256 else None), found


def _policy_beside(directory: Path, verdict: Verdict) -> Policy | None:
    for file in (*packaged_policies().values(), *sorted(directory.glob("*.toml"))):
        try:
            policy = load_policy(file)
        except CompressError:
            continue  # other TOML lies there too
        if policy.sha256() == verdict.policy_sha256:
            return policy
    return None


def _record_in(file: Path, wanted: set[str]) -> dict[str, EvalRecord]:
    try:
        data = file.read_bytes()
        document = json.loads(data)
    except (OSError, ValueError):
        return {}
    if (
        not isinstance(document, dict)
        or document.get("kind") != "compress.eval"
        or document.get("sha256") not in wanted
    ):
        return {}
    record = parse_record(data, str(file))
    return {record.sha256: record}

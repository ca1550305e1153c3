"""`history.jsonl`: one line per gate run, so that releases can be compared long after their files are gone.

A line holds the commit, the date, the hash of the artifact, every gate's value with its bounds, and the hash of the
environment. Lines are only ever appended; the file lives on a data branch or as a CI artifact.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from compress.artifact import durable
from compress.artifact.canonical import canonical_json, sha256_json
from compress.errors import IntegrityError, UserError
from compress.evaluation.record_base import Digest, _Record
from compress.evaluation.record_parts import EnvironmentRecord
from compress.evaluation.reports.verbatim import one_line
from compress.evaluation.verdict import GateResult, Verdict

HISTORY = "history.jsonl"


class GateValue(_Record):
    """One gate of one run; the fields are those of `GateResult`, with the hash of the baseline beside its name."""

    id: str
    kind: str
    role: Literal["primary", "secondary"]
    verdict: Literal["PASS", "FAIL", "INCONCLUSIVE", "WAIVED", "SKIPPED"]
    estimate: float | None
    low: float | None
    high: float | None
    limit: float | None
    rule: Literal["at most", "at least"]
    unit: str
    subject: str | None
    baseline: str
    baseline_digest: Digest


class HistoryLine(_Record):
    """One run of the gate. `release` is the release that this run made, None for any other commit.

    `environment_sha256` is over all that changes the arithmetic (not the number of threads); `texts` maps the name of
    each scored text to the hash of its tokens.
    """

    schema_version: Literal[1] = 1
    kind: Literal["compress.history"] = "compress.history"
    commit: str = Field(min_length=1)
    release: str | None
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    candidate: str
    candidate_digest: Digest
    verdict: Literal["PASS", "FAIL", "INCONCLUSIVE"]
    verdict_sha256: Digest
    policy_sha256: Digest
    environment: str
    environment_sha256: Digest
    texts: dict[str, Digest]
    gates: list[GateValue]

    @property
    def name(self) -> str:
        """How the run is called in tables and pictures: its release, or the commit's first letters."""
        return self.release or self.commit[:8]


def line_of(verdict: Verdict, commit: str, release: str | None = None) -> HistoryLine:
    """The line of a verdict. Raises UserError for a commit or release without a visible letter."""
    for what, text in (("commit", commit), ("release", release)):
        if text is not None and not one_line(text):
            raise UserError(f"the {what} has no name", f"give --{what} NAME")
    machine = verdict.environment
    return HistoryLine(
        commit=one_line(commit),
        release=None if release is None else one_line(release),
        date=verdict.created.isoformat(),
        candidate=verdict.candidate.name,
        candidate_digest=verdict.candidate.digest,
        verdict=verdict.verdict,
        verdict_sha256=verdict.sha256,
        policy_sha256=verdict.policy_sha256,
        environment=f"{machine.runtime} {machine.device} {machine.dtype}",
        environment_sha256=environment_sha256(machine),
        texts={text.name: text.windows_sha256 for text in verdict.texts},
        gates=[_gate(verdict, gate) for gate in verdict.gates],
    )


def environment_sha256(environment: EnvironmentRecord) -> str:
    """Hash of all in an environment that changes the numbers. The number of threads does not."""
    return sha256_json({**environment.model_dump(mode="json", exclude={"threads"}), **environment.arithmetic()})


def append_history(directory: str | Path, line: HistoryLine) -> bool:
    """Adds a line to DIR/history.jsonl, which is made if need be.

    Returns:
        Whether the line was added; False if this verdict of this commit and release is there already.

    Raises:
        IntegrityError: the history that is there is damaged.
        WorkError: it cannot be written.
    """
    folder = Path(directory)
    path = folder / HISTORY
    there = read_history(folder) if path.exists() else []
    if any(
        (old.commit, old.release, old.verdict_sha256) == (line.commit, line.release, line.verdict_sha256)
        for old in there
    ):
        return False
    data = canonical_json(line.model_dump(mode="json"))
    if there:
        durable.append_line(path, data)
    else:
        with durable.guarded("create", folder):
            folder.mkdir(parents=True, exist_ok=True)
        durable.write_atomic(path, data + b"\n")
    return True


def read_history(directory: str | Path) -> list[HistoryLine]:
    """The lines of DIR/history.jsonl, the oldest first.

    Raises:
        UserError: there is no history.
        IntegrityError: a line is cut or is no history line of this version.
    """
    path = Path(directory) / HISTORY
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"there is no {HISTORY} in {directory}: {error.strerror}",
            f"add a first run: `compress trend {directory} --add verdict.json --commit SHA`",
        ) from error
    lines = data.split(b"\n")
    if lines[-1]:
        raise IntegrityError(
            f"{path}: line {len(lines)} is cut: it does not end", "remove that line, and add its run again"
        )
    found = []
    for number, text in enumerate(lines[:-1], start=1):
        try:
            found.append(HistoryLine.model_validate_json(text))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the line"
            raise IntegrityError(
                f"{path}: line {number} is no history line of schema 1: {where}: {first['msg']}",
                "remove that line, and add its run again",
            ) from None
    return found


def _gate(verdict: Verdict, gate: GateResult) -> GateValue:
    fields = {name: getattr(gate, name) for name in GateValue.model_fields if name != "baseline_digest"}
    return GateValue(**fields, baseline_digest=verdict.baselines[gate.baseline].digest)

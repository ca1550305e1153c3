"""The gate's answer as a record: each gate with its bounds, the whole with the hashes of all that it rests on.

This JSON is the source of every report, and a later stage can check it (`compress gate --check`). Free of torch.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress.artifact import durable
from compress.artifact.canonical import sha256_json
from compress.errors import IntegrityError, UserError
from compress.evaluation.gating.kinds import Role
from compress.evaluation.gating.noise_record import NoiseRecord
from compress.evaluation.record_base import Digest
from compress.evaluation.record_parts import DataRecord, EnvironmentRecord, ModelRecord

Outcome = Literal["PASS", "FAIL", "INCONCLUSIVE"]
GateOutcome = Literal["PASS", "FAIL", "INCONCLUSIVE", "WAIVED", "SKIPPED"]
EXIT_CODES: dict[str, int] = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class GateResult(_Record):
    """One gate: what was measured, between which one-sided bounds, against which limit, and why the verdict is so.

    `id` is the policy's, with `:flips` or `:empty` where a gate measures two things; `subject` the text, task or kind
    of work; `unit` that of the numbers (`points` are hundredths of accuracy, `share` a fraction). Numbers that are not
    finite, or were not measured, are None. `p_value`: of "the limit is kept". `baseline`: the name of the one compared
    with. `waiver`: until when, and why, a failure is excused. `power`: what it would take to decide.
    """

    id: str
    kind: str
    role: Role
    verdict: GateOutcome
    estimate: float | None
    low: float | None
    high: float | None
    limit: float | None
    rule: Literal["at most", "at least"]
    unit: str
    message: str
    baseline: str
    subject: str | None = None
    p_value: float | None = None
    waiver: str | None = None
    power: str | None = None


class FlippedItem(_Record):
    """An item of a task that the baseline has right and the candidate wrong; `cluster` is what it belongs to."""

    task: str
    item_id: str
    cluster: str | None
    baseline: str


class CodeRecord(_Record):
    """What decided: the version of this package, and the hash of the sources of its evaluation."""

    version: str
    sha256: Digest


class Verdict(_Record):
    """The gate's answer. `verdict` is the outcome after the policy's `on_inconclusive`; `warnings` did not block.

    `alpha` is the policy's; `alpha_per_look` what each look at growing data may spend of it, the same where there is
    one look only; `look` of `looks` says at which it was decided. `baselines` by name, in the order in which they were
    given; `records` are the hashes of the eval records, of the candidate against each baseline and (`NAME alone`) of a
    baseline scored by itself. `profile` is the part of the policy that the candidate's scheme chose. `worst` are up to
    five items per task that turned wrong. `noise` is the noise floor, where one was measured.
    """

    schema_version: Literal[2] = 2
    kind: Literal["compress.verdict"] = "compress.verdict"
    verdict: Outcome
    policy: str
    policy_sha256: Digest
    profile: str | None
    alpha: float
    alpha_per_look: float
    look: int
    looks: int
    candidate: ModelRecord
    baselines: dict[str, ModelRecord]
    texts: list[DataRecord]
    environment: EnvironmentRecord
    gates: list[GateResult]
    warnings: list[str] = Field(default_factory=list)
    worst: list[FlippedItem] = Field(default_factory=list)
    noise: NoiseRecord | None = None
    records: dict[str, Digest]
    code: CodeRecord
    created: datetime.date
    sha256: Digest = "0" * 64

    @property
    def exit_code(self) -> int:
        """0 passed, 1 failed, 3 inconclusive."""
        return EXIT_CODES[self.verdict]

    @property
    def baseline(self) -> ModelRecord:
        """The first baseline."""
        return next(iter(self.baselines.values()))

    @property
    def against_itself(self) -> bool:
        """Whether candidate and first baseline are one model, so that what is measured is noise."""
        return self.candidate.digest == self.baseline.digest

    def noise_floor(self) -> str:
        """The noise floor in words, or how to measure it."""
        if self.noise is None:
            kernel = self.environment.scoring_kernel()
            named = "" if kernel is None else f" --kernel {kernel}"
            return f"not measured; `compress gate --noise-floor --baseline MODEL{named}` measures it"
        return self.noise.floor()

    def sealed(self) -> Verdict:
        """The same verdict with `sha256` set to the hash of all its other fields."""
        return self.model_copy(update={"sha256": self.expected_sha256()})

    def expected_sha256(self) -> str:
        """What `sha256` must be."""
        return sha256_json(self.model_dump(mode="json", exclude={"sha256"}))

    def to_bytes(self) -> bytes:
        """The file's bytes: indented JSON."""
        return (self.model_dump_json(indent=1) + "\n").encode()


def write_verdict(verdict: Verdict, path: str | Path) -> None:
    """Writes the file so that a reader sees the old one or the whole new one; raises WorkError where it cannot."""
    durable.write_atomic(Path(path), verdict.to_bytes())


def read_verdict(path: str | Path) -> Verdict:
    """The verdict in a file.

    Raises:
        UserError: there is no such file.
        IntegrityError: the file is truncated, was edited, or is no verdict of this version.
    """
    hint = "run `compress gate` again with --output"
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the verdict {path}: {error.strerror}", hint) from error
    try:
        verdict = Verdict.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise IntegrityError(f"{path} is not a whole verdict (schema 2): {where}: {first['msg']}", hint) from None
    if verdict.sha256 != verdict.expected_sha256():
        raise IntegrityError(f"{path} was edited: its sha256 is not that of its contents", hint)
    return verdict

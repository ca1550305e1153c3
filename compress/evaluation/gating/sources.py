"""Where a gate's numbers come from: records that fit are used, models without one are scored.

Candidate and baselines may be eval.json files, artifacts or model directories. Files are only compared, so that anyone
can repeat a verdict without a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from compress.errors import IntegrityError, UserError
from compress.evaluation.gating.comparable import compare, scored_together
from compress.evaluation.gating.comparison import Comparison
from compress.evaluation.gating.kinds import DeviceGate
from compress.evaluation.gating.scoring import Scoring, score, suite_of
from compress.evaluation.policy import Policy
from compress.evaluation.records import DataRecord, EvalRecord, parse_record, read_record
from compress.evaluation.text import read_text
from compress.evaluation.window_sizes import standard_window

FIRST = "baseline"
"""The name of a baseline that was given without one."""


@dataclass(frozen=True, slots=True)
class Gathered:
    """Comparisons by the baseline's name. `text`: the text of gates that name none. `scored`: whether the first
    comparison was scored now, rather than read."""

    comparisons: dict[str, Comparison]
    text: str | None
    scored: bool

    def records(self) -> tuple[EvalRecord, ...]:
        """Every record that the comparisons hold, of the candidate and of baselines scored alone."""
        sides = self.comparisons.values()
        return tuple(each for side in sides for each in (side.record, side.alone) if each is not None)


def gather(
    candidate: str | Path,
    baselines: Mapping[str, str | Path],
    policy: Policy,
    scoring: Scoring,
    *,
    share: float = 1.0,
    fresh: bool = False,
    may_score: bool = True,
) -> Gathered:
    """The candidate beside each baseline, scored on what the policy asks for where no record serves.

    share: of all there is to score. fresh: score even where a record serves, because it was not enough. may_score:
    False refuses where something would have to be scored.

    Raises:
        UserError: no such file or model, or no baseline.
        IntegrityError: damaged or edited files, or records that cannot be compared.
        WorkError: scoring failed.
    """
    found: dict[str, Comparison] = {}
    scored = False
    text: str | None = None
    sides: Mapping[str, str | Path | None] = baselines or {FIRST: None}
    models = tuple(path for path in (candidate, *baselines.values()) if not is_file(path))
    for name, baseline in sides.items():
        first = not found
        lockstep = any(
            gate.lockstep for gate in policy.gate if gate.baseline == name or (first and gate.baseline is None)
        )
        record, alone, made = _records(
            _Wanted(candidate, baseline, models, lockstep, share, fresh, may_score), policy, scoring
        )
        on = check_data(record, policy, share if made else 1.0)
        found[name] = compare(record, alone, name=name, allow_identical=policy.allow_identical)
        if first:
            text, scored = on, made
    return Gathered(found, text, scored)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One comparison to be made. `models`: all that the gate compares. `lockstep`: a gate needs both models scored
    together."""

    candidate: str | Path
    baseline: str | Path | None
    models: tuple[str | Path, ...]
    lockstep: bool
    share: float
    fresh: bool
    may_score: bool

    def score(self, baseline: str | Path | None, policy: Policy, scoring: Scoring) -> EvalRecord:
        """Scores the candidate now. Raises UserError where that is not wanted."""
        if not self.may_score:
            raise UserError(
                f"{self.candidate} has no scores against {self.baseline} that serve this policy",
                "score it first: `compress eval CANDIDATE --baseline BASELINE`, or give its eval.json",
            )
        return score(self.candidate, baseline, policy, scoring.for_all(self.models), self.share)


def _records(wanted: _Wanted, policy: Policy, scoring: Scoring) -> tuple[EvalRecord, EvalRecord | None, bool]:
    """The candidate's record, the baseline's own where the two were not scored together, and whether work was done."""
    candidate, baseline = wanted.candidate, wanted.baseline
    record = None if wanted.fresh else _existing(candidate, policy)
    if record is not None and not scoring.takes(record.environment):
        if baseline is None or is_file(candidate):
            raise _of_another_kernel(candidate, record, scoring)
        record = None
    if baseline is None:
        if record is None:
            raise UserError(f"{candidate} was not scored against a baseline, and none is given", "add --baseline MODEL")
        _require_parent(candidate, record)
        return record, None, False
    if is_file(baseline):
        alone = read_record(baseline)
        if not scoring.takes(alone.environment):
            raise _of_another_kernel(baseline, alone, scoring)
        if record is None or not (is_file(candidate) or _alike(record, alone)):
            return wanted.score(None, policy, scoring.like(alone.environment)), alone, True
        return record, alone, False
    if record is not None and _is(record, baseline):
        return record, None, False
    own = None if wanted.lockstep else _own_record(baseline, policy)
    if record is not None and own is not None and _alike(record, own):
        return record, own, False
    if is_file(candidate):
        assert record is not None
        scored = record.baseline.name if record.baseline is not None else "no baseline"
        raise IntegrityError(
            f"the record of {record.model.name} was scored against {scored}, not against {baseline}",
            "score it again: `compress eval CANDIDATE --baseline BASELINE`",
        )
    return wanted.score(baseline, policy, scoring), None, True


def _of_another_kernel(path: str | Path, record: EvalRecord, scoring: Scoring) -> UserError:
    kernel = record.environment.scoring_kernel() or record.environment.kernel
    return UserError(
        f"the scores of {path} are by kernel {kernel}, not by --kernel {scoring.kernel}",
        "leave --kernel out, or give the models themselves",
    )


def _alike(record: EvalRecord, alone: EvalRecord) -> bool:
    """Whether a record can be compared with one of the baseline alone, as far as arithmetic goes."""
    return scored_together(record, alone) or record.environment.arithmetic() == alone.environment.arithmetic()


def _existing(candidate: str | Path, policy: Policy) -> EvalRecord | None:
    """The candidate's record if it has one that serves; None if it has to be scored."""
    if is_file(candidate) or Path(candidate).suffix == ".json":
        return read_record(candidate)
    return _own_record(candidate, policy, paired=True)


def _own_record(path: str | Path, policy: Policy, *, paired: bool = False) -> EvalRecord | None:
    """The eval.json of an artifact, after its bytes were checked; None for other models, or if it does not serve."""
    from compress.artifact.reader import Artifact
    from compress.models.checkpoint import Checkpoint
    from compress.runtime.sound import check_artifact

    check_artifact(path)
    checkpoint = Checkpoint.open(path)
    if not checkpoint.is_artifact:
        return None
    artifact = Artifact.open(checkpoint.path)
    data = artifact.attachment("eval.json")
    if data is None:
        return None
    where = checkpoint.path / "eval.json"
    record = parse_record(data, str(where))
    if record.artifact_id != artifact.artifact_id:
        raise IntegrityError(f"{where} belongs to another artifact", "score this one again with `compress eval`")
    if (paired and record.baseline is None) or not _serves(record, policy):
        return None
    return record


def _require_parent(candidate: str | Path, record: EvalRecord) -> None:
    """Where nobody says what to compare with, an artifact is held against what it was made from, and nothing else.

    Its own scores could name any model, itself too, and would then pass whatever was lost.
    """
    from compress.artifact.reader import Artifact, is_artifact
    from compress.models.checkpoint import Checkpoint

    directory = Path(candidate).parent if is_file(candidate) else Checkpoint.open(candidate).path
    if record.baseline is None or not is_artifact(directory):
        return
    artifact = Artifact.open(directory)
    if record.artifact_id != artifact.artifact_id:
        return
    parents = artifact.manifest.parents
    if record.baseline.digest not in {parent.digest for parent in parents}:
        raise IntegrityError(
            f"{candidate} was scored against {record.baseline.name}, which it was not made from; its parent is "
            f"{parents[-1].name}",
            "give --baseline MODEL, the model to compare with",
        )


def _serves(record: EvalRecord, policy: Policy) -> bool:
    """Whether an attached record holds what the policy's gates are about, on the data that they were made for."""
    if policy.suite is not None:
        return record.suite is not None and record.suite.sha256 == suite_of(policy).sha256()
    if policy.data is not None and _on(record, policy.data) is None:
        return False
    if _other_windows(record, policy) is not None:
        return False
    tasks = {task.name for task in record.tasks}
    costs = any(isinstance(gate, DeviceGate) for gate in policy.gate)
    return all(gate.task in tasks for gate in policy.tasks()) and (record.cost is not None or not costs)


def _on(record: EvalRecord, data: str) -> str | None:
    """The name under which a record holds a text, recognised by its bytes."""
    wanted = read_text(data).sha256
    return next((text.data.name for text in record.texts if text.data.sha256 == wanted), None)


def check_data(record: EvalRecord, policy: Policy, share: float) -> str | None:
    """The name of the policy's text in a record of a share of all there is.

    Raises:
        IntegrityError: the scores are on anything else.
    """
    if policy.suite is not None:
        suite = suite_of(policy, share)
        if record.suite is None or record.suite.sha256 != suite.sha256():
            made = "no suite" if record.suite is None else f"the suite {record.suite.name!r}"
            if record.suite is not None and record.suite.name == suite.name:
                made += " as it was then"
            raise IntegrityError(
                f"the policy's limits hold for the suite {suite.name!r}; {record.model.name} was scored with {made}",
                f"score with it: `compress eval --suite {policy.suite}`",
            )
        return None
    name = None if policy.data is None else _on(record, policy.data)
    if policy.data is not None and name is None:
        texts = ", ".join(repr(text.data.name) for text in record.texts) or "no text"
        raise IntegrityError(
            f"the policy's limits hold for the text {policy.data!r}; the scores are on {texts}",
            f"score on it (`compress eval --data {policy.data}`), or write a policy with limits for your text",
        )
    if (other := _other_windows(record, policy)) is not None:
        data, wanted = other
        raise IntegrityError(
            f"the policy's limits hold for windows of {wanted} tokens; {record.model.name} was scored on "
            f"{data.name!r} in windows of {data.seq_len}",
            f"score it so: `compress eval --data {policy.data or data.name} --seq-len {wanted}`; limits that were "
            f"measured in other windows say so in their policy (`seq_len = {data.seq_len}`)",
        )
    return name


def _other_windows(record: EvalRecord, policy: Policy) -> tuple[DataRecord, int] | None:
    """The first text that the policy is about and that was cut into other windows, with what they have to be.

    A policy that names neither a text nor a window is about whatever was scored.
    """
    if policy.data is None and policy.seq_len is None:
        return None
    named = None if policy.data is None else {_on(record, policy.data), *policy.texts()}
    for text in record.texts:
        wanted = policy.seq_len or standard_window(text.context)
        if (named is None or text.data.name in named) and text.data.seq_len != wanted:
            return text.data, wanted
    return None


def _is(record: EvalRecord, baseline: str | Path) -> bool:
    """Whether the record's baseline is the model at `baseline`."""
    if record.baseline is None:
        return False
    from compress.models.checkpoint import Checkpoint

    return Checkpoint.open(baseline).digest() == record.baseline.digest


def is_file(path: str | Path) -> bool:
    """Whether a path is a record rather than a model."""
    return Path(path).is_file()

"""The checks of a recipe carried out on an artifact: suites that score it, and gates that let the run go on or end it.

Scores and verdicts are attached to the artifact that they are about. A check that was done before is found there: a
run that was killed and goes on does not score again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from compress.artifact.attach import attach, attach_draft, attach_eval
from compress.artifact.drafting import DraftRecord
from compress.artifact.manifest import EVAL_NAME
from compress.errors import IntegrityError
from compress.recipe_checks import Check, DraftCheck, EvalCheck, GateCheck

if TYPE_CHECKING:
    from compress.artifact.reader import Artifact
    from compress.evaluation.gate import Decision
    from compress.evaluation.records import EvalRecord
    from compress.evaluation.verdict import Verdict
    from compress.progress import Progress

VERDICT_NAME = "verdict.json"


@dataclass(frozen=True, slots=True)
class Checked:
    """The artifact with what was attached, and the verdicts so far; the last of them may not be PASS."""

    artifact: Artifact
    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        """Whether the run goes on."""
        return all(verdict.verdict == "PASS" for verdict in self.verdicts)


def carry_out(
    checks: Sequence[Check], artifact: Artifact, root: str | Path, *, device: str, progress: Progress | None
) -> Checked:
    """Does the checks in order, up to the first gate that does not pass. root: the model that the run begins with.

    Raises:
        UserError, WorkError, IntegrityError: as `evaluate` and `gate` do; no such suite or policy.
    """
    verdicts: list[Verdict] = []
    for check in checks:
        if isinstance(check, EvalCheck):
            artifact = _scored(check, artifact, root, device, progress)
            continue
        if isinstance(check, DraftCheck):
            artifact = _drafted(check, artifact, root, device, progress)
            continue
        name = VERDICT_NAME if not verdicts else f"verdict-{len(verdicts) + 1}.json"
        artifact, verdict = _gated(check, artifact, root, name, device, progress)
        verdicts.append(verdict)
        if verdict.verdict != "PASS":
            break
    return Checked(artifact, tuple(verdicts))


def refuse_unknown(checks: Sequence[Check]) -> None:
    """Raises UserError for a suite or a policy that is not there, before any work is done for it."""
    from compress.evaluation.policy import load_policy
    from compress.evaluation.suites import load_suite

    for check in checks:
        if isinstance(check, GateCheck):
            load_policy(check.policy)
        elif isinstance(check, EvalCheck):
            load_suite(check.suite)


def _drafted(
    check: DraftCheck, artifact: Artifact, root: str | Path, device: str, progress: Progress | None
) -> Artifact:
    from compress.evaluation.suites import packaged_prompts
    from compress.models.checkpoint import Checkpoint
    from compress.models.hub import local_directory
    from compress.runtime.loading import load
    from compress.runtime.text_model import TextModel
    from compress.workflows.drafts import open_draft, worth

    path = local_directory(check.target or root)
    target = Checkpoint.open(path)
    before, asked = artifact.draft(), packaged_prompts(check.prompts)
    wanted: dict[str, Any] = {
        "target": path.resolve().name,
        "target_digest": target.digest(),
        "draft_tokens": check.tokens,
        "prompts": len(asked),
        "new_tokens": check.new_tokens,
    }
    if before is not None and wanted.items() <= before.items():
        return artifact
    live = cast(TextModel, load(path, device=device))
    draft = open_draft(artifact.path, live, device=device)
    found = worth(live, draft, check.tokens, prompts=asked, new_tokens=check.new_tokens, progress=progress)
    record = DraftRecord(
        **wanted,
        **asdict(found.speculation),
        acceptance=found.acceptance or 0.0,
        tokens_per_step=found.tokens_per_step or 1.0,
        same_answers=found.equal,
    )
    return attach_draft(artifact.path, record)


def _scored(check: EvalCheck, artifact: Artifact, root: str | Path, device: str, progress: Progress | None) -> Artifact:
    from compress.models.checkpoint import Checkpoint
    from compress.models.hub import local_directory
    from compress.workflows.quantize import score, suite_that_runs

    suite = suite_that_runs(check.suite, progress)
    record = attached_record(artifact)
    if record is not None and record.baseline is not None:
        from compress.evaluation.scope import resolve

        same = record.suite == resolve(suite, max_tokens=check.max_tokens).record
        if same and record.baseline.digest == Checkpoint.open(local_directory(root)).digest():
            return artifact
    return score(artifact, root, suite=suite, device=device, max_tokens=check.max_tokens, progress=progress)


def _gated(
    check: GateCheck, artifact: Artifact, root: str | Path, name: str, device: str, progress: Progress | None
) -> tuple[Artifact, Verdict]:
    from compress.evaluation.gate import decide_release
    from compress.evaluation.resume import keeping

    def decide(fresh: bool) -> Decision:
        return decide_release(
            artifact.path, root, check.policy, device=device, cache_dir=keep, fresh=fresh, progress=progress
        )

    command = {"artifact": artifact.artifact_id, "baseline": str(root), "policy": check.policy, "device": device}
    with keeping(None, command, progress) as keep:
        before = attached_record(artifact)
        done = decide(fresh=False)
        if done.verdict.verdict == "INCONCLUSIVE" and before is not None and _of(done) == before.sha256:
            done = decide(fresh=True)  # a few tokens had been scored, of all that the policy would
        if before is None or _of(done) != before.sha256:
            artifact = attach_eval(artifact.path, done.records[0].to_bytes())
        return attach(artifact.path, {name: done.verdict.to_bytes()}), done.verdict


def _of(done: Decision) -> str:
    return done.records[0].sha256


def attached_record(artifact: Artifact) -> EvalRecord | None:
    """The scores that an artifact holds; None without, or with such as are damaged or of an older schema."""
    from compress.evaluation.records import parse_record

    try:
        data = artifact.attachment(EVAL_NAME)
        return None if data is None else parse_record(data, str(artifact.path / EVAL_NAME))
    except IntegrityError:
        return None

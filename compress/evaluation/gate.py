"""`gate`: is this compressed model good enough to release? Finds or makes the scores, then lets the policy decide.

Candidate and baseline may be eval.json files, artifacts or model directories. Files are only compared, so that anyone
can repeat a verdict without a model; models are scored where no fitting record exists.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import IntegrityError, UserError
from compress.evaluation.measures import Comparison
from compress.evaluation.policy import Policy, default_policy, load_policy
from compress.evaluation.records import EvalRecord, parse_record, read_record
from compress.evaluation.text import DEFAULT, read_text
from compress.evaluation.verdict import Verdict, decide

if TYPE_CHECKING:
    from compress.progress import Progress


def gate(
    candidate: str | Path,
    baseline: str | Path | None = None,
    policy: str | Path | Policy | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> Verdict:
    """Decides whether `candidate` may be released. `policy`: a file, a Policy, or None for the packaged default.

    An artifact's own eval.json is used if it was scored against this baseline; otherwise candidate and baseline are
    scored now. A candidate given as a file needs no `baseline` if it was scored against one.

    Raises:
        UserError: no such file or model, no baseline, a bad policy.
        IntegrityError: damaged or edited files, or records of other tokens, tokenizers, baselines or arithmetic.
        WorkError: scoring failed.
    """
    rules = policy if isinstance(policy, Policy) else load_policy(policy or default_policy())
    record = _existing(candidate, baseline, rules)
    alone: EvalRecord | None = None
    if record is None:
        if baseline is None:
            raise UserError(f"{candidate} was not scored against a baseline, and none is given", "add --baseline MODEL")
        if _is_file(baseline):
            alone = read_record(baseline)
        record = _evaluate(candidate, None if alone else baseline, rules, device, dtype, progress)
    elif baseline is not None and _is_file(baseline):
        alone = read_record(baseline)
    if not _on_its_text(record, rules):
        raise IntegrityError(
            f"the policy's limits hold for the text {rules.data!r}; the scores are on {record.data.name!r}",
            f"score on it (`compress eval --data {rules.data}`), or write a policy with limits for your text",
        )
    return decide(compare(record, alone), rules, record.data, record.environment)


def compare(record: EvalRecord, alone: EvalRecord | None) -> Comparison:
    """The comparison in one record that has a baseline, or of a record with that of a baseline scored alone.

    Raises:
        IntegrityError: the two do not belong together, or a quantised candidate is indistinguishable from its baseline.
    """
    blocks = record.blocks
    if alone is not None:
        _check_comparable(record, alone)
    if record.baseline is not None and blocks.nll_baseline is not None:
        if blocks.kl is not None and not any(blocks.kl) and _must_differ(record):
            raise IntegrityError(
                f"{record.model.name} is quantised, yet it answers exactly as {record.baseline.name} does",
                "the wrong weights were scored: check what the candidate's directory holds",
            )
        tail = record.summary.kl_percentiles
        return Comparison(record.model, record.baseline, blocks, blocks.nll_baseline, tail)
    if alone is None:
        raise IntegrityError(
            f"the record of {record.model.name} has no baseline",
            "run `compress eval CANDIDATE --baseline BASELINE`, or give --baseline",
        )
    return Comparison(record.model, alone.model, blocks, alone.blocks.nll)


def _existing(candidate: str | Path, baseline: str | Path | None, policy: Policy) -> EvalRecord | None:
    """The candidate's record if it has one that serves; None if it has to be scored."""
    if _is_file(candidate):
        record = read_record(candidate)
        if baseline is not None and not _is_file(baseline):
            _check_baseline(record, baseline)
        return record
    from compress.artifact.reader import Artifact
    from compress.evaluation.identity import check_artifact
    from compress.models.checkpoint import Checkpoint

    check_artifact(candidate)
    path = Checkpoint.open(candidate).path
    if not Checkpoint.open(candidate).is_artifact:
        return None
    artifact = Artifact.open(path)
    data = artifact.attachment("eval.json")
    if data is None:
        return None
    record = parse_record(data, str(path / "eval.json"))
    if record.artifact_id != artifact.artifact_id:
        raise IntegrityError(
            f"{path / 'eval.json'} belongs to another artifact", "score this one again with `compress eval`"
        )
    if record.baseline is None or not _on_its_text(record, policy):
        return None
    if baseline is not None and record.baseline is not None and not _is(record, baseline):
        return None
    return record


def _on_its_text(record: EvalRecord, policy: Policy) -> bool:
    """Whether the record was made on the text that the policy's limits were measured on."""
    return policy.data is None or record.data.sha256 == read_text(policy.data).sha256


def _is(record: EvalRecord, baseline: str | Path) -> bool:
    """Whether the record's baseline is the model or record at `baseline`."""
    if record.baseline is None:
        return False
    if _is_file(baseline):
        return read_record(baseline).model.digest == record.baseline.digest
    from compress.models.checkpoint import Checkpoint

    return Checkpoint.open(baseline).digest() == record.baseline.digest


def _check_baseline(record: EvalRecord, baseline: str | Path) -> None:
    if not _is(record, baseline):
        scored = record.baseline.name if record.baseline is not None else "no baseline"
        raise IntegrityError(
            f"the record of {record.model.name} was scored against {scored}, not against {baseline}",
            "score it again: `compress eval CANDIDATE --baseline BASELINE`",
        )


def _check_comparable(record: EvalRecord, alone: EvalRecord) -> None:
    """Two records may be compared only if nothing but the weights differs."""
    pairs = [
        ("tokenizer", record.model.tokenizer_sha256, alone.model.tokenizer_sha256),
        ("text", record.data.sha256, alone.data.sha256),
        ("tokens", record.data.windows_sha256, alone.data.windows_sha256),
        ("blocks", record.blocks.tokens, alone.blocks.tokens),
    ]
    if record.baseline is not None:
        pairs.append(("baseline", record.baseline.digest, alone.model.digest))
    else:
        ours, theirs = record.environment, alone.environment
        pairs += [(f, getattr(ours, f), getattr(theirs, f)) for f in ("runtime", "kernel", "device", "dtype")]
    for what, ours_value, theirs_value in pairs:
        if ours_value != theirs_value:
            raise IntegrityError(
                f"the records of {record.model.name} and {alone.model.name} cannot be compared: another {what}",
                "score both on the same text with the same settings, or give the two models",
            )


def _must_differ(record: EvalRecord) -> bool:
    baseline = record.baseline
    return baseline is not None and record.model.quantized and record.model.digest != baseline.digest


def _evaluate(
    candidate: str | Path,
    baseline: str | Path | None,
    policy: Policy,
    device: str,
    dtype: str,
    progress: Progress | None,
) -> EvalRecord:
    from compress.evaluation.evaluate import evaluate

    return evaluate(
        candidate,
        baseline,
        data=policy.data or DEFAULT,
        max_tokens=policy.max_tokens,
        device=device,
        dtype=dtype,
        progress=progress,
    )


def _is_file(path: str | Path) -> bool:
    return Path(path).is_file()

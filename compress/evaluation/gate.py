"""`gate`: is this compressed model good enough to release? Finds or makes the scores, then lets the policy decide."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import IntegrityError, UserError
from compress.evaluation.gating.comparable import compare
from compress.evaluation.gating.decide import Look, decide
from compress.evaluation.gating.noise import find_noise, refuse_below_noise
from compress.evaluation.gating.noise_record import NoiseRecord
from compress.evaluation.gating.plan import GatePlan, plan
from compress.evaluation.gating.scoring import Scoring, planned_tokens
from compress.evaluation.gating.sources import FIRST, Gathered, gather, is_file
from compress.evaluation.policy import Policy, default_policy, load_policy
from compress.evaluation.verdict import Verdict, read_verdict

if TYPE_CHECKING:
    from compress.progress import Progress

__all__ = ["check", "compare", "gate", "measure_floor", "plan_gate", "refuse_policy_below"]

PathLike = str | Path
Baselines = PathLike | Mapping[str, PathLike] | None


def gate(
    candidate: PathLike,
    baseline: Baselines = None,
    policy: PathLike | Policy | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    cache_dir: PathLike | None = None,
    noise: NoiseRecord | None = None,
    today: datetime.date | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Decides whether `candidate` may be released. `policy`: a file, a packaged name, or a Policy.

    An artifact's own eval.json is used if it was scored against this baseline; otherwise candidate and baseline are
    scored now. A candidate given as a file needs no `baseline` if it was scored against one. Several baselines are
    given as a mapping from the names that the policy's gates use. noise: the noise floor; the one kept for this
    environment if None. today: the day that waivers are held against (UTC).

    Raises:
        UserError: no such file or model, no baseline, a bad policy, or one that asks for less than the noise.
        IntegrityError: damaged or edited files, or records of other tokens, tokenizers, baselines or arithmetic.
        WorkError: scoring failed.
    """
    rules = _policy(policy)
    named = _named(baseline)
    scoring = Scoring(device, dtype, cache_dir, progress)
    looks = rules.looks if rules.on_inconclusive == "extend" else 1
    gathered = gather(candidate, named, rules, scoring, share=1 / looks)
    verdict = _decide(gathered, rules, Look(1, looks), noise, today)
    if looks == 1 or verdict.verdict != "INCONCLUSIVE":
        return verdict
    if is_file(candidate) or not named or any(is_file(path) for path in named.values()):
        more = "cannot be extended: records hold no more than they hold; give the models to score more"
        return _with_warning(verdict, more)
    size = _size(gathered)
    number = 1
    for step in range(2, looks + 1):
        if step < looks and rules.suite is None and (planned_tokens(candidate, rules, step / looks) or 0) <= size:
            continue
        gathered = gather(candidate, named, rules, scoring, share=step / looks, fresh=True)
        if _size(gathered) <= size:
            continue
        size, number = _size(gathered), number + 1
        verdict = _decide(gathered, rules, Look(number, looks), noise, today)
        if verdict.verdict != "INCONCLUSIVE":
            return verdict
    return _with_warning(verdict, "still open after all there is was scored")


def plan_gate(
    policy: PathLike | Policy | None = None, candidate: PathLike | None = None, baseline: Baselines = None
) -> GatePlan:
    """What a policy can decide; see `compress.evaluation.gating.plan`. Scores nothing.

    With a candidate (its eval.json, or an artifact that has one) the plan rests on what was seen; else on what the
    policy's suite or text holds and on the flips that its gates expect.

    Raises:
        UserError, IntegrityError: as `gate`, or the candidate has no scores that serve, or, without a candidate, the
            policy has a gate on what its suite does not score, or a text of too few tokens for an interval.
    """
    rules = _policy(policy)
    if candidate is not None:
        gathered = gather(candidate, _named(baseline), rules, Scoring(), may_score=False)
        return plan(rules, comparisons=gathered.comparisons, text=gathered.text)
    from compress.evaluation.gating.suite_sizes import items_of, prompts_of, require_scored, tokens_of

    require_scored(rules)
    if rules.suite is None:
        return plan(rules, tokens=tokens_of(rules))
    return plan(rules, items=items_of(rules), prompts=prompts_of(rules), tokens=tokens_of(rules))


def measure_floor(
    baseline: PathLike,
    policy: PathLike | Policy | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> NoiseRecord:
    """The noise floor of a model in this environment, on what the policy scores.

    Raises:
        UserError: no such model.
        IntegrityError, WorkError: as scoring does.
    """
    from compress.evaluation.gating.noise import measure_noise
    from compress.evaluation.gating.noise_data import noise_data
    from compress.evaluation.identity import check_artifact
    from compress.runtime.transformers_backend import load

    rules = _policy(policy)
    check_artifact(baseline, scores=False)
    runtime = load(baseline, device=device, dtype=dtype)
    return measure_noise(runtime, progress=progress, **noise_data(rules))


def refuse_policy_below(noise: NoiseRecord, policy: PathLike | Policy | None = None) -> None:
    """Raises UserError where a gate of the policy, in any profile, allows less than a model loses against itself."""
    rules = _policy(policy)
    refuse_below_noise(rules.gate, noise)
    for profile in rules.profile.values():
        refuse_below_noise(profile.apply(rules.gate), noise)


def check(
    path: PathLike,
    candidate: PathLike | None = None,
    baseline: Baselines = None,
    policy: PathLike | Policy | None = None,
) -> Verdict:
    """The verdict in a file, after its hash was checked; with the records and the policy, derived from them again.

    candidate, baseline: the eval.json files that the verdict rests on. Nothing is scored. policy: the one that it must
    have been decided by; the default one if None and a candidate is given.

    Raises:
        UserError: there is no such file, or a baseline is given without a candidate.
        IntegrityError: the file was edited, or the records and the policy do not give this verdict.
    """
    verdict = read_verdict(path)
    rules = _policy(policy)
    if (policy is not None or candidate is not None) and rules.sha256() != verdict.policy_sha256:
        raise IntegrityError(
            f"{path} was decided by the policy {verdict.policy!r} with other contents than {rules.name!r} has",
            "give the --policy that it was decided by",
        )
    if candidate is None:
        if baseline is not None:
            raise UserError("a baseline alone derives no verdict again", "give the candidate's eval.json too")
        return verdict
    gathered = gather(candidate, _named(baseline), rules, Scoring(), may_score=False)
    again = decide(
        gathered.comparisons,
        rules,
        text=gathered.text,
        look=Look(verdict.look, verdict.looks),
        noise=verdict.noise,
        today=verdict.created,
    )
    for field in ("candidate", "baselines", "records", "gates", "verdict", "alpha_per_look"):
        if getattr(again, field) != getattr(verdict, field):
            raise IntegrityError(
                f"{path} does not follow from the records: its `{field}` would be another",
                "it was made from other records, by another version, or by hand: run `compress gate` again",
            )
    return verdict


def _decide(
    gathered: Gathered, policy: Policy, look: Look, noise: NoiseRecord | None, today: datetime.date | None
) -> Verdict:
    first = next(iter(gathered.comparisons.values()))
    floor = noise or find_noise(first.baseline.digest, first.record.environment)
    if floor is not None:
        if floor.digest != first.baseline.digest:
            raise IntegrityError(
                f"the noise floor is that of {floor.model}, not of {first.baseline.name}",
                "measure it: `compress gate --noise-floor --baseline MODEL`",
            )
        refuse_below_noise(policy.for_scheme(first.candidate.scheme)[1], floor)
    return decide(gathered.comparisons, policy, text=gathered.text, look=look, noise=floor, today=today)


def _size(gathered: Gathered) -> int:
    """Tokens and items that the first comparison rests on."""
    record = next(iter(gathered.comparisons.values())).record
    return sum(text.data.tokens for text in record.texts) + sum(len(task.item_ids) for task in record.tasks)


def _with_warning(verdict: Verdict, warning: str) -> Verdict:
    return verdict.model_copy(update={"warnings": [*verdict.warnings, warning]}).sealed()


def _named(baseline: Baselines) -> dict[str, PathLike]:
    if baseline is None:
        return {}
    return dict(baseline) if isinstance(baseline, Mapping) else {FIRST: baseline}


def _policy(policy: PathLike | Policy | None) -> Policy:
    return policy if isinstance(policy, Policy) else load_policy(policy or default_policy())

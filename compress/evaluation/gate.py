"""`gate`: is this compressed model good enough to release? Finds or makes the scores, then lets the policy decide."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import IntegrityError
from compress.evaluation.gating.check import NO_MORE_TO_READ, NO_MORE_TO_SCORE, Checked, check_verdict
from compress.evaluation.gating.comparable import compare
from compress.evaluation.gating.decide import Look, decide
from compress.evaluation.gating.noise import find_noise, refuse_below_noise
from compress.evaluation.gating.noise_record import NoiseRecord
from compress.evaluation.gating.plan import GatePlan, plan
from compress.evaluation.gating.scoring import Scoring, planned_tokens
from compress.evaluation.gating.sources import FIRST, Gathered, gather, is_file
from compress.evaluation.policy import Policy, default_policy, load_policy
from compress.evaluation.records import EvalRecord
from compress.evaluation.verdict import Verdict

if TYPE_CHECKING:
    from compress.progress import Progress

__all__ = ["check", "compare", "decide_release", "gate", "measure_floor", "plan_gate", "refuse_policy_below"]

PathLike = str | Path
Baselines = PathLike | Mapping[str, PathLike] | None


@dataclass(frozen=True, slots=True)
class Decision:
    """A verdict, and the policy and records that it can be derived from again."""

    verdict: Verdict
    policy: Policy
    records: tuple[EvalRecord, ...]


def gate(
    candidate: PathLike,
    baseline: Baselines = None,
    policy: PathLike | Policy | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    kernel: str = "auto",
    cache_dir: PathLike | None = None,
    noise: NoiseRecord | None = None,
    today: datetime.date | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Decides whether `candidate` may be released. `policy`: a file, a packaged name, or a Policy.

    An artifact's own eval.json is used if it was scored against this baseline, with this kernel where one is named;
    otherwise candidate and baseline are scored now. A candidate given as a file needs no `baseline` if it was scored
    against one. Several baselines are given as a mapping from the names that the policy's gates use. device, dtype,
    kernel: as in `evaluate`. noise: the noise floor; the one kept for this environment if None. today: the day that
    waivers are held against (UTC).

    Raises:
        UserError: no such file or model, no baseline, a bad policy, or one that asks for less than the noise.
        IntegrityError: damaged or edited files, or records of other tokens, tokenizers, baselines or arithmetic.
        WorkError: scoring failed.
    """
    return decide_release(
        candidate,
        baseline,
        policy,
        device=device,
        dtype=dtype,
        kernel=kernel,
        cache_dir=cache_dir,
        noise=noise,
        today=today,
        progress=progress,
    ).verdict


def decide_release(
    candidate: PathLike,
    baseline: Baselines = None,
    policy: PathLike | Policy | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    kernel: str = "auto",
    cache_dir: PathLike | None = None,
    noise: NoiseRecord | None = None,
    today: datetime.date | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Decision:
    """As `gate`, with what the verdict rests on. fresh: score anew, even where there are scores that would serve."""
    rules = _policy(policy)
    named = _named(baseline)
    scoring = Scoring(device, dtype, kernel, cache_dir, progress)
    looks = rules.looks if rules.on_inconclusive == "extend" else 1
    gathered = gather(candidate, named, rules, scoring, share=1 / looks, fresh=fresh)
    verdict = _decide(gathered, rules, Look(1, looks), noise, today)
    if looks == 1 or verdict.verdict != "INCONCLUSIVE":
        return Decision(verdict, rules, gathered.records())
    if is_file(candidate) or not named or any(is_file(path) for path in named.values()):
        return Decision(_with_warning(verdict, NO_MORE_TO_READ), rules, gathered.records())
    size = _size(gathered)
    number = 1
    for step in range(2, looks + 1):
        if step < looks and rules.suite is None and (planned_tokens(candidate, rules, step / looks) or 0) <= size:
            continue
        larger = gather(candidate, named, rules, scoring, share=step / looks, fresh=True)
        if _size(larger) <= size:
            continue
        gathered, size, number = larger, _size(larger), number + 1
        verdict = _decide(gathered, rules, Look(number, looks), noise, today)
        if verdict.verdict != "INCONCLUSIVE":
            return Decision(verdict, rules, gathered.records())
    return Decision(_with_warning(verdict, NO_MORE_TO_SCORE), rules, gathered.records())


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
    kernel: str = "auto",
    progress: Progress | None = None,
) -> NoiseRecord:
    """The noise floor of a model in this environment, on what the policy scores.

    Raises:
        UserError: no such model.
        IntegrityError, WorkError: as scoring does.
    """
    from compress.evaluation.gating.noise import measure_noise
    from compress.evaluation.gating.noise_data import noise_data
    from compress.evaluation.scoring_kernel import chosen_kernel, open_runtime

    rules = _policy(policy)
    runtime = open_runtime(baseline, device, dtype, chosen_kernel([baseline], device, dtype, kernel, progress))
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
    *,
    allowed_signers: PathLike | None = None,
    today: datetime.date | None = None,
) -> Checked:
    """A verdict made elsewhere, as it stands today: derived again from its records, or vouched for by a signer.

    Records and policy are those given, else the ones found beside the file by their hashes in it: what `--output` keeps
    there, an eval.json, a policy's TOML, a packaged policy. Nothing is scored. A waiver that has expired since is void.
    candidate, baseline: the eval.json files that the verdict rests on. policy: the one that it must have been decided
    by. allowed_signers: the file must be signed by one of these; a verdict without its records counts only then.

    Raises:
        UserError: there is no such file, or a baseline is given without a candidate.
        IntegrityError: the file was edited, contradicts itself, does not follow from the records and the policy, is not
            signed as asked, or cannot be checked for lack of records.
    """
    signer = None
    if allowed_signers is not None:
        from compress.evaluation.gating.signing import verify

        signer = verify(Path(path), Path(allowed_signers))
    rules = None if policy is None else _policy(policy)
    day = today or datetime.datetime.now(datetime.UTC).date()
    return check_verdict(Path(path), candidate, _named(baseline), rules, signer, day)


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

"""Before anything is scored: which gates of a policy the data can decide, and what the others would need.

A gate that can only ever say INCONCLUSIVE is a defect of the policy, and better found before a night of scoring than
after it. Without an eval record the plan knows the number of items, and reckons with the share of flips that each gate
expects; with one it also knows the spread over tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from compress.errors import UserError
from compress.evaluation.gating.comparison import Comparison
from compress.evaluation.gating.decide import against, alpha_per_look
from compress.evaluation.gating.kinds import (
    AccuracyPaired,
    AnswerGate,
    Degenerate,
    Gate,
    GenerationIdentical,
    KlP999,
    Role,
    SpeedRatio,
    TextGate,
    Top1Agreement,
)
from compress.evaluation.gating.measure_text import TAIL
from compress.evaluation.gating.power import (
    POWER,
    items_message,
    items_needed,
    needed_size,
    smoothed,
    without_hits,
)
from compress.evaluation.measures import Measure, Skipped, measure
from compress.evaluation.policy import Policy

DEPENDS = "depends on the candidate: give its eval.json to know"
FLIPS = (0.02, 0.05, 0.10)
"""Shares of flips of the power table: what 8, 5 and 3 to 4 bits tend to give."""


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One gate. `has` and `needs` count `counted`; None where that is not known before scoring.

    `resolves` (tasks only): share of flips -> the smallest true loss in points that would be found with 80% power.
    `decidable` None: it depends on the candidate, so nothing is refused.
    """

    gate: str
    kind: str
    role: Role
    counted: str
    has: int | None
    needs: int | None
    decidable: bool | None
    message: str
    resolves: Mapping[float, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GatePlan:
    """The plan of a policy. `alpha` is what one look may spend, `power` what `needs` is reckoned with."""

    policy: str
    profile: str | None
    alpha: float
    power: float
    rows: list[PlanRow]

    def require_decidable(self) -> None:
        """Raises UserError where a primary gate cannot be decided by the data."""
        hopeless = [row for row in self.rows if row.role == "primary" and row.decidable is False]
        if hopeless:
            raise UserError(
                f"the policy {self.policy} cannot be decided: "
                + "; ".join(f"{row.gate}: {row.message}" for row in hopeless),
                "score more, allow a wider margin, or make the gate secondary",
            )


def plan(
    policy: Policy,
    *,
    comparisons: Mapping[str, Comparison] | None = None,
    items: Callable[[str], int | None] = lambda task: None,
    prompts: int | None = None,
    tokens: Callable[[str | None], int | None] = lambda text: None,
    scheme: str = "dense",
    text: str | None = None,
) -> GatePlan:
    """What a policy can decide.

    comparisons: of a scored candidate, if there is one. Else `items` tells how many items of a task there would be,
    `prompts` how many answers, and `tokens` how many tokens of a text at most (None: of gates that name none).
    scheme: chooses the profile where there is no candidate.

    Raises:
        UserError, IntegrityError: the comparisons lack what a gate needs.
    """
    alpha = alpha_per_look(policy)
    if comparisons:
        scheme = next(iter(comparisons.values())).candidate.scheme
    profile, gates = policy.for_scheme(scheme)
    rows: list[PlanRow] = []
    for gate in gates:
        if comparisons:
            rows += _seen(gate, comparisons, policy, alpha, text)
        else:
            rows.append(_expected(gate, alpha, items, prompts, tokens))
    return GatePlan(policy.name, profile, alpha, POWER, rows)


def _seen(
    gate: Gate, comparisons: Mapping[str, Comparison], policy: Policy, alpha: float, text: str | None
) -> list[PlanRow]:
    found = measure(gate, against(gate, comparisons), seed=policy.seed, text=text)
    if isinstance(found, Skipped):
        message = f"would be skipped: {found.reason}"
        return [_row(gate, "", None, None, False, message)]
    return [_of_measure(gate, each, alpha) for each in found]


def _of_measure(gate: Gate, found: Measure, alpha: float) -> PlanRow:
    name = gate.id if found.part is None else f"{gate.id}:{found.part}"
    if found.exact:
        return _row(gate, "", None, None, True, "exact", name=name)
    decided = found.inside(alpha) or found.outside(alpha)
    if isinstance(gate, AccuracyPaired) and found.part is None and found.flips is not None:
        size = found.size or 0
        row = _task_row(gate, size, smoothed(found.flips, size), alpha)
        return replace(row, decidable=True) if decided else row
    needs = needed_size(found, alpha)
    message = "the data decide it" if decided else f"{found.estimate:.4g} is too close to the limit {found.limit:g}"
    if not decided and needs is not None and found.size:
        message += f": needs about {needs:,} {found.counted}; has {found.size:,}"
    return _row(gate, found.counted, found.size, needs, decided, message, name=name)


def _expected(
    gate: Gate,
    alpha: float,
    items: Callable[[str], int | None],
    prompts: int | None,
    tokens: Callable[[str | None], int | None],
) -> PlanRow:
    if isinstance(gate, AccuracyPaired):
        has = items(gate.task)
        if gate.items is not None:
            has = gate.items if has is None else min(has, gate.items)
        if has is None:
            return _row(gate, "items", None, items_needed(gate.margin, gate.flips, alpha), None, "unknown until scored")
        return _task_row(gate, has, gate.flips, alpha)
    if isinstance(gate, GenerationIdentical | Degenerate):
        return _answers_row(gate, alpha, prompts)
    if isinstance(gate, KlP999 | Top1Agreement):
        return _share_row(gate, TAIL if isinstance(gate, KlP999) else 1 - gate.min, alpha, tokens(gate.text))
    if isinstance(gate, SpeedRatio):
        return _row(gate, "rounds", None, math.ceil(-math.log2(alpha)), None, "at the very least")
    if isinstance(gate, TextGate):
        return _row(gate, "tokens", tokens(gate.text), None, None, DEPENDS)
    return _row(gate, "", None, None, None, DEPENDS)


def _task_row(gate: AccuracyPaired, has: int, flips: float, alpha: float) -> PlanRow:
    from compress.evaluation.statistics import smallest_drop

    needs = items_needed(gate.margin, flips, alpha)
    enough = needs is not None and has >= needs
    resolves = {each: 100 * smallest_drop(has, each, alpha, POWER) for each in FLIPS}
    message = "a margin of 0 can only fail" if needs is None else items_message(needs, gate.margin, flips, has)
    if gate.max_flips is not None and flips >= gate.max_flips:
        enough, message = False, f"expects flips of {100 * flips:.3g}% and allows {100 * gate.max_flips:.3g}%"
    return PlanRow(gate.id, gate.kind, gate.role, "items", has, needs, enough, message, resolves)


def _share_row(gate: Gate, share: float, alpha: float, has: int | None) -> PlanRow:
    """A share of tokens: `has` is the most that there may be, so more than enough decides nothing yet."""
    needs = without_hits(share, alpha)
    if needs is None:
        return _row(gate, "tokens", has, None, False, "no number of tokens proves that there is not one")
    if has is not None and has < needs:
        message = f"needs {needs:,} tokens even if none is beyond it; has {has:,}"
        return _row(gate, "tokens", has, needs, False, message)
    return _row(gate, "tokens", has, needs, None, "at the very least; more where clusters differ")


def _answers_row(gate: AnswerGate, alpha: float, prompts: int | None) -> PlanRow:
    share = 1 - gate.min if isinstance(gate, GenerationIdentical) else gate.max
    needs = without_hits(share, alpha)
    if needs is None:
        return _row(gate, "prompts", prompts, None, False, "no number of prompts proves that there is not one")
    decidable = None if prompts is None else prompts >= needs
    message = f"needs {needs} prompts even if none is lost" + ("" if prompts is None else f"; has {prompts}")
    return _row(gate, "prompts", prompts, needs, decidable, message)


def _row(
    gate: Gate,
    counted: str,
    has: int | None,
    needs: int | None,
    decidable: bool | None,
    message: str,
    *,
    name: str | None = None,
) -> PlanRow:
    kind = str(gate.kind)  # type: ignore[attr-defined]
    return PlanRow(name or gate.id, kind, gate.role, counted, has, needs, decidable, message)


def power_table(sizes: Sequence[int], alpha: float) -> list[tuple[int, dict[float, float]]]:
    """(items, flips -> smallest loss in points that is found with 80% power), for any policy."""
    from compress.evaluation.statistics import smallest_drop

    return [(size, {each: 100 * smallest_drop(size, each, alpha, POWER) for each in FLIPS}) for size in sizes]

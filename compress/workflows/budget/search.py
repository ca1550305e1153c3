"""From a budget to an artifact: measure, choose, make, measure what was made.

`bits` and `bytes` are solved once. For `kl` the predicted KL is compared with the measured one of each recipe
tried, and the prediction is corrected by their ratio for the next try, until the measured KL is just below the limit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.artifact import durable
from compress.artifact.attach import attach
from compress.artifact.journal import Journal
from compress.artifact.output import refuse_occupied
from compress.errors import UserError
from compress.evaluation.reports.plots.style import png
from compress.pipeline.run import deterministic
from compress.progress import NullProgress, Progress
from compress.recipe import Recipe
from compress.types import IntScheme
from compress.workflows import quantize as making
from compress.workflows.budget.divergence import divergence
from compress.workflows.budget.measured import LEARNING_WINDOWS, Search, open_search
from compress.workflows.budget.recipes import chosen_recipe
from compress.workflows.budget.report import PICTURE_NAME, REPORT_NAME, BudgetReport, Point, UnitChoice, picture
from compress.workflows.budget.room import allowed_bits, file_bytes
from compress.workflows.budget.solve import least_bits, least_loss
from compress.workflows.budget.target import Target
from compress.workflows.quantize import QuantizeResult

MOST_TRIES = 6
CLOSE_ENOUGH = 0.95
"""A measured KL of at least this share of the limit ends the search for a smaller recipe."""
FRONT_POINTS = 24


@dataclass(frozen=True)
class BudgetResult:
    """What was made, and how it was chosen; the report is attached to the artifact."""

    made: QuantizeResult
    report: BudgetReport


@dataclass(frozen=True)
class _Choice:
    """One option per unit."""

    schemes: list[IntScheme]
    bits: int
    predicted: float


def quantize_to_budget(
    recipe: Recipe,
    target: Target,
    *,
    model: str | Path | None = None,
    group_sizes: Sequence[int | None] | None = None,
    chosen_tables: Sequence[str] = (),
    output: Path | None = None,
    device: str = "auto",
    restart: bool = False,
    evaluate: bool = True,
    eval_tokens: int | None = None,
    progress: Progress | None = None,
) -> BudgetResult:
    """Makes the best mixture of integer schemes within a budget; the artifact's recipe.yaml makes the same bytes again.

    recipe: method, calibration, ignored linears and symmetry; its bits and group size are what is chosen.
    group_sizes: those to choose from; 32, 64 and 128 if None. chosen_tables: `embeddings` and `head`, those of them
    whose schemes are chosen too. Other arguments as for `workflows.quantize.quantize`.

    Raises:
        UserError: a budget that cannot be met (with the nearest that can), or what `quantize` raises.
        WorkError, IntegrityError: as `quantize` does. Measurements that were finished are kept.
    """
    progress = progress or NullProgress()
    refuse_occupied(output, restart=restart)
    if evaluate:
        making.refuse_few_tokens(recipe, model, eval_tokens)
    search = open_search(
        recipe, model=model, output=output, device=device, group_sizes=group_sizes, chosen_tables=chosen_tables
    )
    solver = Solver(search, target)
    if not search.held_out:
        progress.warn("the calibration text has no windows left to measure on: KL is measured on those it learns from")
    with deterministic() as workers:
        solver.losses = search.losses(workers, progress)
    tried: list[Point] = []
    choice = solver.within_kl(target.value, tried, progress) if target.kind == "kl" else solver.within_bits()
    made = making.quantize(
        solver.recipe(choice), model=model, output=output, device=device, restart=restart, evaluate=evaluate,
        eval_tokens=eval_tokens, progress=progress,
    )  # fmt: skip
    report = solver.report(choice, solver.measured_kl(made.artifact.path, choice), tried)
    data = (json.dumps(report.document(), indent=1, allow_nan=False) + "\n").encode()
    old = made.artifact.attachment(REPORT_NAME) if REPORT_NAME in made.artifact.manifest.attachments else None
    if old != data:
        attach(made.artifact.path, {REPORT_NAME: data, PICTURE_NAME: png(picture(report))})
    return BudgetResult(made, report)


class Solver:
    """The choices that a search's losses lead to."""

    def __init__(self, search: Search, target: Target) -> None:
        self._search, self._target = search, target
        self._bits = [list(unit.bits) for unit in search.units]
        self._weights = sum(unit.weights for unit in search.units)
        self._allowed = None if target.kind == "kl" else allowed_bits(target, search.job, search.units)
        self.losses: list[list[float]] = []

    def within_bits(self) -> _Choice:
        """The least loss within the budget."""
        assert self._allowed is not None
        places = least_loss(self._bits, self.losses, self._allowed)
        assert places is not None, "allowed_bits refuses what cannot be met"
        return self._choice(places)

    def within_kl(self, limit: float, tried: list[Point], progress: Progress) -> _Choice:
        """The fewest bits whose measured KL is at most `limit`, among the few that are tried; appends to `tried`."""
        best: _Choice | None = None
        ratio, seen = 1.0, set()
        for _ in range(MOST_TRIES):
            places = least_bits(self._bits, self.losses, limit / ratio)
            choice = self._richest() if places is None else self._choice(places)
            recipe = self.recipe(choice)
            if recipe.hash() in seen or (best is not None and choice.bits >= best.bits):
                break
            seen.add(recipe.hash())
            measured = self._try(recipe, choice, progress)
            tried.append(self._point("tried", choice, measured))
            if measured <= limit:
                best = choice
                if measured >= CLOSE_ENOUGH * limit:
                    break
            elif places is None:
                break
            # Aims inside the strip between close enough and the limit, at a prediction as wrong as this one was.
            ratio = measured / choice.predicted * 2 / (1 + CLOSE_ENOUGH)
        if best is None:
            lowest = min(point.measured_kl or 0.0 for point in tried)
            raise UserError(
                f"--max-kl {limit:g} cannot be kept: the best that was tried has {lowest:.4g}",
                f"the nearest is --max-kl {lowest * 1.001:.4g}; another method or more --samples may do better",
            )
        return best

    def recipe(self, choice: _Choice) -> Recipe:
        """What says this choice."""
        return chosen_recipe(self._search.job.recipe, self._search.units, choice.schemes)

    def measured_kl(self, artifact: Path, choice: _Choice) -> float:
        """KL of what was made of a choice, on the measuring text; measured once."""
        journal = Journal(self._search.directory / "made.jsonl")
        key = self.recipe(choice).hash()
        for entry in journal.entries:
            if entry["recipe"] == key:
                return float(entry["kl"])
        kl = divergence(self._search.job.checkpoint.path, artifact, self._search.measuring)
        journal.append({"recipe": key, "kl": kl})
        return kl

    def report(self, choice: _Choice, measured: float, tried: list[Point]) -> BudgetReport:
        """Everything that was found."""
        search = self._search
        picked = zip(search.units, choice.schemes, self.losses, strict=True)
        rows = [(u, s, loss[u.options.index(s)], u.bits[u.options.index(s)]) for u, s, loss in picked]
        return BudgetReport(
            target=self._target.text,
            chosen=self._point("chosen", choice, measured),
            tried=tried,
            front=self._front(),
            uniform=self._uniform(),
            units=[UnitChoice(u.name, u.weights, s.label, bits / u.weights, loss) for u, s, loss, bits in rows],
            signal={
                "method": "rtn, searched scales" if search.method is None else "gptq, no correction, no polish",
                "calibration": search.learning.name,
                "learning_tokens": min(LEARNING_WINDOWS, search.learning.tokens.shape[0]) * search.measuring.shape[1],
                "measuring_tokens": search.measuring.numel(),
                "held_out": search.held_out,
                "file_bytes_at_most": file_bytes(search.job, search.units, choice.bits),
            },
        )

    def _try(self, recipe: Recipe, choice: _Choice, progress: Progress) -> float:
        """The measured KL of a recipe; its artifact is made aside and thrown away."""
        from compress import pipeline

        aside = self._search.directory / recipe.hash()[:16]
        made = pipeline.run(recipe, output=aside, device="cpu", progress=progress)
        try:
            return self.measured_kl(made.artifact.path, choice)
        finally:
            durable.remove_tree(aside)

    def _front(self) -> list[Point]:
        """The best predicted for sizes between the smallest and the largest."""
        least, most = (sum(pick(row) for row in self._bits) for pick in (min, max))
        points = []
        for step in range(FRONT_POINTS + 1):
            places = least_loss(self._bits, self.losses, least + (most - least) * step // FRONT_POINTS)
            assert places is not None
            points.append(self._point(f"front {step}", self._choice(places)))
        return points

    def _uniform(self) -> list[Point]:
        """Every scheme that all units may have."""
        units = self._search.units
        shared = [option for option in units[0].options if all(option in unit.options for unit in units)]
        return [
            self._point(option.label, self._choice([unit.options.index(option) for unit in units])) for option in shared
        ]

    def _richest(self) -> _Choice:
        return self._choice([row.index(min(row)) for row in self.losses])

    def _choice(self, places: Sequence[int]) -> _Choice:
        schemes = [unit.options[place] for unit, place in zip(self._search.units, places, strict=True)]
        bits = sum(row[place] for row, place in zip(self._bits, places, strict=True))
        return _Choice(schemes, bits, sum(row[place] for row, place in zip(self.losses, places, strict=True)))

    def _point(self, name: str, choice: _Choice, measured: float | None = None) -> Point:
        return Point(name, choice.bits / self._weights, choice.predicted, measured)

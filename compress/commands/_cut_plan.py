"""How the plan of a cut in whole blocks or experts is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.commands._output import View, facts
from compress.commands._plan_parts import cost_facts, costs

if TYPE_CHECKING:
    from compress.pipeline import CutPlan
    from compress.recipe import Recipe


def show(plan: CutPlan, recipe: Recipe, view: View) -> None:
    """Lines, or JSON."""
    view.result(_document(plan, recipe), _lines(plan))


def _document(plan: CutPlan, recipe: Recipe) -> dict[str, Any]:
    return {
        "model": plan.model,
        "method": plan.method,
        "keep": plan.keep,
        "achieved": plan.achieved,
        "units": plan.units,
        "kept": plan.kept,
        "all_units": plan.all_units,
        "parameters": plan.parameters,
        "all_parameters": plan.all_parameters,
        "output": plan.output,
        "recipe_hash": recipe.hash(),
        **costs(plan),
    }


def _lines(plan: CutPlan) -> list[str]:
    change = f"{plan.all_parameters} -> {plan.parameters} (keep {plan.achieved:.4f}, asked {plan.keep:g})"
    return facts(
        (
            ("model", plan.model),
            ("method", plan.method),
            (plan.units, f"{plan.kept} of {plan.all_units}"),
            ("parameters", change),
            *cost_facts(plan),
        )
    )

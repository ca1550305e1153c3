"""How the plan of a distillation is shown."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from compress.commands._output import View, duration, facts
from compress.commands._plan_parts import cost_facts

if TYPE_CHECKING:
    from compress.pipeline import DistillPlan
    from compress.recipe import Recipe


def show(plan: DistillPlan, recipe: Recipe, view: View) -> None:
    """As lines or JSON."""
    document: dict[str, Any] = {field.name: getattr(plan, field.name) for field in fields(plan)}
    view.result({**document, "recipe_hash": recipe.hash()}, _lines(plan))


def _lines(plan: DistillPlan) -> list[str]:
    steps = f"{plan.steps}" if plan.steps is not None else f"as many as fit into {duration(60 * (plan.minutes or 0))}"
    return facts(
        (
            ("student", plan.model),
            ("teacher", plan.teacher),
            ("loss", plan.method),
            ("trained", f"{plan.weights}: {plan.trained} values for {plan.parameters} weights"),
            ("steps", f"{steps}, of {plan.tokens_per_step} tokens"),
            ("text", f"{plan.windows} windows, and {plan.held_out} held out"),
            *cost_facts(plan),
        )
    )

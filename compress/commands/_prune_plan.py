"""How the plan of a pruning is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.commands._output import View, facts
from compress.commands._plan_parts import by_kind, cost_facts, costs

if TYPE_CHECKING:
    from compress.pipeline import PrunePlan
    from compress.recipe import Recipe


def show(plan: PrunePlan, recipe: Recipe, view: View) -> None:
    """The linears as a table, the rest as lines or JSON."""
    view.table("Linears", ("LINEARS", ">COUNT", ">IN", ">OUT", "SPARSITY", "NOTE"), _rows(plan))
    view.result(_document(plan, recipe), _lines(plan))


def _document(plan: PrunePlan, recipe: Recipe) -> dict[str, Any]:
    return {
        "model": plan.model,
        "method": plan.method,
        "sparsity": plan.sparsity,
        "format": plan.format,
        "output": plan.output,
        "recipe_hash": recipe.hash(),
        "zeros": plan.zeros,
        "parameters": plan.parameters,
        **costs(plan),
    }


def _lines(plan: PrunePlan) -> list[str]:
    pruned = sum(linear.sparsity is not None for linear in plan.linears)
    where = " (zeros take their place in the file)" if plan.format == "dense" else " (packed; compress alone reads it)"
    share = f"{100 * plan.zeros / plan.parameters:.1f}% of all parameters"
    return facts(
        (
            ("model", plan.model),
            ("method", plan.method),
            ("linears", f"{pruned} of {len(plan.linears)} pruned to {plan.sparsity}"),
            ("zeros", f"{plan.zeros} ({share})"),
            *cost_facts(plan, where),
        )
    )


def _rows(plan: PrunePlan) -> list[tuple[object, ...]]:
    return by_kind(
        (
            each.name, each.in_features, each.out_features,
            plan.sparsity if each.sparsity is not None else "kept", each.reason or "",
        )
        for each in plan.linears
    )  # fmt: skip

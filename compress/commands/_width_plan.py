"""How the plan of a width cut is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.commands._output import View, facts
from compress.commands._plan_parts import by_kind, cost_facts, costs

if TYPE_CHECKING:
    from compress.pipeline import WidthPlan
    from compress.pipeline.width_shape import WidthCut
    from compress.recipe import Recipe


def show(plan: WidthPlan, recipe: Recipe, view: View) -> None:
    """The linears as a table, the rest as lines or JSON."""
    view.table("Linears", ("LINEARS", ">COUNT", ">IN", ">OUT", ">NEW IN", ">NEW OUT"), _rows(plan))
    view.result(_document(plan, recipe), _lines(plan))


def _document(plan: WidthPlan, recipe: Recipe) -> dict[str, Any]:
    return {
        "model": plan.model,
        "method": plan.method,
        "keep": plan.keep,
        "achieved": plan.cut.keep,
        "cut": plan.cut,
        "output": plan.output,
        "recipe_hash": recipe.hash(),
        **costs(plan),
    }


def _lines(plan: WidthPlan) -> list[str]:
    cut = plan.cut
    return facts(
        (
            ("model", plan.model),
            ("method", plan.method),
            *_neurons(cut, any(".experts." in each.name for each in plan.linears)),
            ("query heads", f"{cut.heads * cut.kv_heads} of {cut.all_heads * cut.kv_heads} in every block"),
            *((("channels of the stream", f"{cut.hidden} of {cut.all_hidden}"),) if cut.narrows else ()),
            ("parameters", f"{cut.all_parameters} -> {cut.parameters} (keep {cut.keep:.4f}, asked {plan.keep:g})"),
            *cost_facts(plan),
        )
    )


def _neurons(cut: WidthCut, mixture: bool) -> list[tuple[str, str]]:
    lines = [("neurons", f"{cut.neurons} of {cut.all_neurons} in every {'expert' if mixture else 'block'}")]
    if cut.shared:
        shared = f"{cut.shared * cut.neurons} of {cut.shared * cut.all_neurons} in those that every token goes through"
        lines.append(("shared experts", shared))
    if cut.all_dense:
        lines.append(("dense blocks", f"{cut.dense} of {cut.all_dense} neurons"))
    return lines


def _rows(plan: WidthPlan) -> list[tuple[object, ...]]:
    return by_kind(
        (each.name, each.in_features, each.out_features, each.kept_in, each.kept_out) for each in plan.linears
    )

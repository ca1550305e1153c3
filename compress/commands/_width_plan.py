"""How the plan of a width cut is shown."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from compress.commands._output import View, duration, facts, numberless, relative, size

if TYPE_CHECKING:
    from compress.pipeline import WidthPlan
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
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.output_bytes,
        "peak_memory_bytes": plan.peak_memory_bytes,
        "seconds_estimate": plan.seconds_estimate,
        "problems": plan.problems,
        "linears": plan.linears,
    }


def _lines(plan: WidthPlan) -> list[str]:
    cut = plan.cut
    return facts(
        (
            ("model", plan.model),
            ("method", plan.method),
            ("neurons", f"{cut.neurons} of {cut.all_neurons} in every block"),
            ("query heads", f"{cut.heads * cut.kv_heads} of {cut.all_heads * cut.kv_heads} in every block"),
            ("parameters", f"{cut.all_parameters} -> {cut.parameters} (keep {cut.keep:.4f}, asked {plan.keep:g})"),
            ("size", f"{size(plan.source_bytes)} -> {size(plan.output_bytes)}"),
            ("peak memory", f"about {size(plan.peak_memory_bytes)}"),
            ("time", f"about {duration(plan.seconds_estimate)}"),
            ("output", relative(plan.output)),
        )
    )


def _rows(plan: WidthPlan) -> list[tuple[object, ...]]:
    """One row per kind of linear: same name apart from numbers, same shapes."""
    kinds: Counter[tuple[object, ...]] = Counter(
        (numberless(each.name), each.in_features, each.out_features, each.kept_in, each.kept_out)
        for each in plan.linears
    )
    return [(name, count, *rest) for (name, *rest), count in kinds.items()]

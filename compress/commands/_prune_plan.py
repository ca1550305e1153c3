"""How the plan of a pruning is shown."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from compress.commands._output import View, duration, facts, numberless, relative, size

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
        "output": plan.output,
        "recipe_hash": recipe.hash(),
        "zeros": plan.zeros,
        "parameters": plan.parameters,
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.output_bytes,
        "peak_memory_bytes": plan.peak_memory_bytes,
        "seconds_estimate": plan.seconds_estimate,
        "problems": plan.problems,
        "linears": plan.linears,
    }


def _lines(plan: PrunePlan) -> list[str]:
    pruned = sum(linear.sparsity is not None for linear in plan.linears)
    share = f"{100 * plan.zeros / plan.parameters:.1f}% of all parameters"
    return facts(
        (
            ("model", plan.model),
            ("method", plan.method),
            ("linears", f"{pruned} of {len(plan.linears)} pruned to {plan.sparsity}"),
            ("zeros", f"{plan.zeros} ({share})"),
            ("size", f"{size(plan.source_bytes)} -> {size(plan.output_bytes)} (zeros take their place in the file)"),
            ("peak memory", f"about {size(plan.peak_memory_bytes)}"),
            ("time", f"about {duration(plan.seconds_estimate)}"),
            ("output", relative(plan.output)),
        )
    )


def _rows(plan: PrunePlan) -> list[tuple[object, ...]]:
    """One row per kind of linear: same name apart from numbers, same shape, sparsity and reason."""
    kinds: Counter[tuple[object, ...]] = Counter()
    for linear in plan.linears:
        amount = plan.sparsity if linear.sparsity is not None else "kept"
        kinds[(numberless(linear.name), linear.in_features, linear.out_features, amount, linear.reason or "")] += 1
    return [(name, count, *rest) for (name, *rest), count in kinds.items()]

"""What the views of all plans share: the costs, and the table of linears with equal ones in one row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from compress.commands._output import View, duration, numberless, relative, size

if TYPE_CHECKING:
    from compress.pipeline import AnyPlan


def costs(plan: AnyPlan) -> dict[str, Any]:
    """The last entries of the document."""
    return {
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.output_bytes,
        "peak_memory_bytes": plan.peak_memory_bytes,
        "seconds_estimate": plan.seconds_estimate,
        "problems": plan.problems,
        "linears": plan.linears,
    }


def cost_facts(plan: AnyPlan, note: str = "") -> tuple[tuple[str, str], ...]:
    """The last facts; `note` stands behind the size."""
    return (
        ("size", f"{size(plan.source_bytes)} -> {size(plan.output_bytes)}{note}"),
        ("peak memory", f"about {size(plan.peak_memory_bytes)}"),
        ("time", f"about {duration(plan.seconds_estimate)}"),
        ("output", relative(plan.output)),
    )


def warn_of_memory(peak: int, view: View) -> None:
    """Warns where a run needs more memory than is free here; both are estimates, so that nothing is refused."""
    from compress.workflows import memory

    free = memory.available_memory("cpu")
    if free is not None and peak > free:
        said = f"that peak is more than the {size(free)} of memory free here"
        view.warn(f"{said}: fewer --samples or a shorter --seq-len need less")


def by_kind(linears: Iterable[tuple[str, *tuple[object, ...]]]) -> list[tuple[object, ...]]:
    """One row per kind of linear: (name, cells...) alike apart from numbers in the name, counted behind the name."""
    kinds = Counter((numberless(name), *cells) for name, *cells in linears)
    return [(name, count, *cells) for (name, *cells), count in kinds.items()]

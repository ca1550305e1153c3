"""How the plan of a run of several stages is shown: a row per stage, and what only the run will tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compress.commands._output import View, duration, facts, relative, size
from compress.commands._plan_parts import warn_of_memory
from compress.errors import UserError

if TYPE_CHECKING:
    from compress.recipe import Recipe
    from compress.recipe_checks import Check
    from compress.workflows.staged_plan import StagePlan

COLUMNS = ("STAGE", "WHAT", ">SIZE BEFORE", ">AFTER", ">PEAK MEMORY", ">TIME", "NOT KNOWN BEFORE THE RUN")


def show(plans: Sequence[StagePlan], recipe: Recipe, view: View) -> None:
    """The stages as a table, the whole as lines or JSON. Raises UserError where a stage has a problem."""
    view.table("Stages", COLUMNS, [row for plan in plans for row in _rows(plan)])
    view.result(_document(plans, recipe), _lines(plans))
    warn_of_memory(max((staged.plan.peak_memory_bytes for staged in plans if staged.plan is not None), default=0), view)
    for staged in plans:
        if staged.plan is not None and staged.plan.problems:
            said = "; ".join(staged.plan.problems)
            raise UserError(f"the plan of stage {staged.number} has a problem: {said}", staged.plan.hint)


def _what(staged: StagePlan) -> str:
    stage = staged.stage
    amounts = [
        text
        for name in ("keep", "sparsity", "pattern", "minutes", "steps")
        if (text := f"{name} {value}" if (value := getattr(stage, name, None)) is not None else "")
    ]
    scheme = getattr(stage, "scheme", None)
    if scheme is not None:
        amounts.append(scheme.to_scheme().label)
    return f"{stage.kind} {stage.method.kind}" + (f" ({', '.join(amounts)})" if amounts else "")


def _check(check: Check) -> str:
    if check.kind == "draft":
        return f"draft for {check.target or 'the model'}"
    return f"gate {check.policy}" if check.kind == "gate" else f"eval {check.suite}"


def _rows(staged: StagePlan) -> list[tuple[object, ...]]:
    plan, unknown = staged.plan, "; ".join(staged.unknown)
    if plan is None:
        unknown = f"its size and time: the stage before it decides them; {unknown}"
        rows: list[tuple[object, ...]] = [(staged.number, _what(staged), "-", "-", "-", "-", unknown)]
    else:
        before, after = size(plan.source_bytes), size(plan.output_bytes)
        costs = (f"about {size(plan.peak_memory_bytes)}", f"about {duration(plan.seconds_estimate)}")
        rows = [(staged.number, _what(staged), before, after, *costs, unknown)]
    return [*rows, *(("", _check(check), "", "", "", "", "") for check in staged.checks)]


def _document(plans: Sequence[StagePlan], recipe: Recipe) -> dict[str, Any]:
    known = [staged.plan for staged in plans if staged.plan is not None]
    return {
        "recipe_hash": recipe.hash(),
        "stages": [
            {
                "number": staged.number,
                "kind": staged.stage.kind,
                "method": staged.stage.method.kind,
                "plan": staged.plan,
                "not_known": staged.unknown,
                "checks": staged.checks,
            }
            for staged in plans
        ],
        "source_bytes": known[0].source_bytes,
        "output_bytes": known[-1].output_bytes if len(known) == len(plans) else None,
        "peak_memory_bytes": max(plan.peak_memory_bytes for plan in known) if len(known) == len(plans) else None,
        "seconds_estimate": sum(plan.seconds_estimate for plan in known) if len(known) == len(plans) else None,
        "output": known[-1].output if len(known) == len(plans) else None,
        "problems": [problem for plan in known for problem in plan.problems],
    }


def _lines(plans: Sequence[StagePlan]) -> list[str]:
    known = [staged.plan for staged in plans if staged.plan is not None]
    first, last = known[0], known[-1]
    if len(known) < len(plans):
        after = f"known up to stage {len(known)}: {size(first.source_bytes)} -> {size(last.output_bytes)}"
        return facts((("model", first.model), ("stages", len(plans)), ("size", after)))
    return facts(
        (
            ("model", first.model),
            ("stages", len(plans)),
            ("size", f"{size(first.source_bytes)} -> {size(last.output_bytes)}"),
            ("peak memory", f"about {size(max(plan.peak_memory_bytes for plan in known))}"),
            ("time", f"about {duration(sum(plan.seconds_estimate for plan in known))}, scoring and gates apart"),
            ("output", relative(last.output)),
        )
    )

"""`--target-bits`, `--target-size` and `--max-kl` of quantize: what a search made or would do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.commands import _environment
from compress.commands._make import show_made
from compress.commands._output import View, duration, facts, number, numberless, relative, size
from compress.commands._plan_parts import warn_of_memory
from compress.commands._quantize_options import Quantize, parse_group_size

if TYPE_CHECKING:
    from compress.recipe import Recipe
    from compress.workflows.budget.report import BudgetReport
    from compress.workflows.budget.target import Target


def wanted(options: Quantize) -> Target | None:
    """The budget that the options name, None for none.

    Raises:
        UserError: two budgets, one that is none, or options that say what the budget is to choose.
    """
    from compress.workflows.budget.target import chosen_tables, parse_target

    chosen = {"bits": options.bits, "scheme": options.scheme}
    target = parse_target(options.target_bits, options.target_size, options.max_kl, chosen, options.target_file_bits)
    chosen_tables(options.embeddings, options.head, target)
    return target


def make_within(target: Target, recipe: Recipe, options: Quantize, view: View) -> None:
    """Searches, makes the artifact and shows both; the path of the artifact goes to stdout."""
    _environment.prepare(options.threads)
    _environment.import_models()
    from compress.workflows.budget.search import quantize_to_budget

    result = quantize_to_budget(
        recipe,
        target,
        group_sizes=_group_sizes(options),
        chosen_tables=_tables(options, target),
        output=options.output,
        device=options.device,
        restart=options.restart,
        evaluate=not options.no_eval,
        eval_tokens=options.eval_tokens,
        progress=view.progress(),
    )
    _show(result.report, view)
    show_made(result.made, view, {"budget": result.report})
    view.note(f"the recipe: {relative(result.made.artifact.path / 'recipe.yaml')}; the picture: budget.png beside it")


def show_plan_within(target: Target, recipe: Recipe, options: Quantize, view: View) -> None:
    """Says what a search would measure and make. Raises UserError for a budget that cannot be met."""
    _environment.prepare(options.threads)
    _environment.import_models()
    from compress.workflows.budget.measured import open_search
    from compress.workflows.budget.plan import plan_budget

    search = open_search(
        recipe, model=None, output=options.output, device=options.device, group_sizes=_group_sizes(options),
        chosen_tables=_tables(options, target),
    )  # fmt: skip
    plan = plan_budget(search, target)
    view.result(
        {name: getattr(plan, name) for name in plan.__dataclass_fields__},
        facts(
            (
                ("model", plan.model),
                ("method", plan.method),
                ("budget", plan.target),
                ("choices", f"{plan.units} sets of {plan.linears} linears, {len(plan.options)} schemes"),
                ("bits per weight", f"{number(plan.lowest_bits_per_weight)} to {number(plan.highest_bits_per_weight)}"),
                ("size", f"{size(plan.lowest_bytes)} to {size(plan.highest_bytes)}, now {size(plan.source_bytes)}"),
                ("measurements", f"{plan.measurements} of KL, {plan.known} of them known from before"),
                ("artifacts made", "1" if plan.runs == 1 else f"at most {plan.runs}"),
                ("peak memory", f"about {size(plan.peak_memory_bytes)}"),
                ("time", f"about {duration(plan.seconds_estimate)}"),
                ("measurements are kept in", relative(plan.directory)),
            )
        ),
    )  # fmt: skip
    warn_of_memory(plan.peak_memory_bytes, view)


def _tables(options: Quantize, target: Target) -> list[str]:
    from compress.workflows.budget.target import chosen_tables

    return chosen_tables(options.embeddings, options.head, target)


def _group_sizes(options: Quantize) -> list[int | None] | None:
    from compress.workflows.budget.target import chosen_group_sizes

    return chosen_group_sizes(parse_group_size(options.group_size))


def _show(report: BudgetReport, view: View) -> None:
    rows: dict[tuple[str, str], list[float]] = {}
    for unit in report.units:
        counts = rows.setdefault((numberless(unit.name), unit.scheme), [0, 0, 0.0])
        for place, value in enumerate((1, unit.weights, unit.predicted_kl)):
            counts[place] += value
    title = f"{report.target}: what was chosen"
    view.table(
        title, ("LINEARS", "SCHEME", ">SETS", ">WEIGHTS", ">KL PREDICTED"),
        [(*key, int(n), int(weights), number(kl, 3)) for key, (n, weights, kl) in sorted(rows.items())],
    )  # fmt: skip
    chosen = report.chosen
    points: list[tuple[Any, ...]] = [(point.name, point) for point in report.tried]
    best = [p for p in report.uniform if p.bits_per_weight <= chosen.bits_per_weight]
    points += [("best one scheme for all", min(best, key=lambda p: p.predicted_kl))] if best else []
    points += [("this artifact", chosen)]
    view.table(
        "Size and KL on calibration text", ("", ">BITS/WEIGHT", ">KL PREDICTED", ">KL MEASURED"),
        [(name if name != "best one scheme for all" else f"{name}: {p.name}", f"{p.bits_per_weight:.3f}",
          number(p.predicted_kl), number(p.measured_kl)) for name, p in points],
    )  # fmt: skip

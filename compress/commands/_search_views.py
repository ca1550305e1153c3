"""How a search is run from the command line and shown: the table of its candidates, and the plan of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.commands import _environment
from compress.commands._command import Outcome
from compress.commands._gate_views import OUTCOMES, verdict_table
from compress.commands._make import gates_said, show_made
from compress.commands._output import View, duration, number, size
from compress.commands._run_options import RunRecipe
from compress.errors import UserError

if TYPE_CHECKING:
    from compress.recipe_search import Search
    from compress.workflows.search import Found, Row

COLUMNS = ("CANDIDATE", ">SIZE", ">PARAMETERS", ">KL", "INTERVAL", ">PERPLEXITY", ">HELD-OUT KL", "SO")


def run_search(search: Search, options: RunRecipe, view: View) -> Outcome:
    """Finds the winner, shows the table, and carries out what follows."""
    _environment.prepare(options.threads)
    _environment.import_models()
    from compress.workflows import search as work

    progress = view.progress()
    found = work.find(search, output=options.output, device=options.device, restart=options.restart, progress=progress)
    view.table("Candidates, taught alike", COLUMNS, [_row(row, found) for row in found.rows])
    document = {"search": {"winner": found.winner, "candidates": found.rows}}
    if found.winner is None:
        assert found.verdict is not None
        verdict_table(found.verdict, view)
        view.warn(f"no candidate passes the gate {found.verdict.policy}: the run ended behind its search")
        view.result(document, [row.artifact for row in found.rows[:1]])
        return OUTCOMES[found.verdict.verdict]
    result = work.run(
        search,
        found,
        output=options.output,
        device=options.device,
        restart=options.restart,
        evaluate=not options.no_eval,
        eval_tokens=options.eval_tokens,
        progress=progress,
    )
    show_made(result, view, document)
    return gates_said(result, search.won(found.winner), view)


def plan_search(search: Search, options: RunRecipe, view: View) -> Outcome:
    """Every candidate planned with all that follows it, as if it won. Raises UserError where one has a problem."""
    _environment.prepare(options.threads)
    _environment.import_models()
    from compress.workflows import staged_plan

    rows, document, seconds, hints = [], {}, 0.0, list[str]()
    for name in search.candidates:
        plans = staged_plan.plan(
            search.won(name), model=None, output=None, device=options.device, restart=options.restart, scored=True
        )
        known = [staged.plan for staged in plans if staged.plan is not None]
        own = len(search.candidates[name].stages)
        seconds += sum(plan.seconds_estimate for plan in known[:own])
        made = known[own - 1].output_bytes if len(known) >= own else None
        whole = known[-1].output_bytes if len(known) == len(plans) else None
        memory = f"about {size(max(plan.peak_memory_bytes for plan in known))}"
        problems = "; ".join(problem for plan in known for problem in plan.problems)
        hints += [plan.hint for plan in known if plan.problems]
        rows.append((name, size(made), size(whole), memory, problems))
        document[name] = plans
    view.table("Candidates", ("CANDIDATE", ">SIZE", ">AFTER ALL STAGES", ">PEAK MEMORY", "PROBLEMS"), rows)
    view.result(
        {"candidates": document, "seconds_estimate": seconds},
        [f"{len(rows)} candidates, made and taught in about {duration(seconds)}; which one wins only the run tells"],
    )
    if hints:
        said = "; ".join(f"{row[0]}: {row[-1]}" for row in rows if row[-1])
        raise UserError(f"the plan has a problem: {said}", hints[0])
    return Outcome.OK


def _row(row: Row, found: Found) -> tuple[object, ...]:
    so = "wins" if row.name == found.winner else "" if row.competes else "larger: does not compete"
    so = f"{so} {row.verdict}".strip() if row.verdict else so
    learned = "" if row.before is None else f"{number(row.before)} -> {number(row.after)}"
    interval = "" if row.kl.low is None else f"{number(row.kl.low)} to {number(row.kl.high)}"
    ratio = "" if row.perplexity_ratio is None else f"{row.perplexity_ratio:.3f}x"
    return row.name, size(row.bytes), row.parameters, number(row.kl.value), interval, ratio, learned, so

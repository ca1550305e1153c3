"""`compress plan quantize|run`: what a run would make and cost, without making it. Also the view of `--dry-run`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from compress.commands import (
    _budget,
    _cut_plan,
    _cut_target,
    _distill_plan,
    _environment,
    _prune_plan,
    _stages_plan,
    _width_plan,
)
from compress.commands._command import command
from compress.commands._distill_options import Distill
from compress.commands._options import Run
from compress.commands._output import View, facts, number, size
from compress.commands._plan_parts import by_kind, cost_facts, costs, warn_of_memory
from compress.commands._prune_options import Prune
from compress.commands._quantize_options import Quantize
from compress.commands._run_options import RunRecipe
from compress.commands._search_views import plan_search
from compress.distillation.processes import shared_by
from compress.errors import UserError

if TYPE_CHECKING:
    from compress.pipeline import Plan
    from compress.recipe import Recipe


@command("quantize", Quantize)
def plan_quantize(options: Quantize, view: View) -> None:
    """Plan a quantisation: scheme and bits of every linear, output size, peak memory, time.

    The options are those of `compress quantize`.

    Examples:

      $ compress plan quantize --method awq --bits 4
      $ compress plan quantize ./model --method gptq --bits 3 --group-size 64 --json
      $ compress plan quantize ./model --target-size 3.2GiB
    """
    target, recipe = _budget.wanted(options), build(options, view)
    if target is not None:
        _budget.show_plan_within(target, recipe, options, view)
    else:
        show_plan(recipe, options, view)


@command("prune", Prune)
def plan_prune(options: Prune, view: View) -> None:
    """Plan a pruning: sparsity of every linear, output size, peak memory, time.

    The options are those of `compress prune`.

    Examples:

      $ compress plan prune --method sparsegpt --sparsity 0.5
      $ compress plan prune ./model --method wanda --pattern 2:4 --json
      $ compress plan prune ./model --method width --target-params 4M
    """
    target, recipe = options.target(), build(options, view)
    if target is not None:
        recipe = _cut_target.aimed(target, recipe, options, view)
    show_plan(recipe, options, view)


@command("distill", Distill)
def plan_distill(options: Distill, view: View) -> None:
    """Plan a distillation: what is trained, on how much text, output size, peak memory, time.

    The options are those of `compress distill`.

    Examples:

      $ compress plan distill --student ./tales-keep75
      $ compress plan distill --student ./small --full --steps 500 --json
    """
    with shared_by(options.processes):
        show_plan(build(options, view), options, view)


@command("run", RunRecipe)
def plan_run(options: RunRecipe, view: View) -> None:
    """Plan the run of a recipe: of several stages each, on what the one before it will make.

    The options are those of `compress run`.

    Examples:

      $ compress plan run recipes/gptq-w3-g128.yaml
      $ compress plan run my.yaml --set stages.0.scheme.group_size=64
    """
    from compress.recipe_search import load_search

    search = load_search(options.recipe, options.overrides, model=options.model, seed=options.seed)
    with shared_by(options.processes):
        if search is not None:
            plan_search(search, options, view)
        else:
            show_plan(build(options, view), options, view)


def build(options: Quantize | Prune | Distill | RunRecipe, view: View) -> Recipe:
    """The recipe that the options describe; what has no effect is noted."""
    from compress.recipe_build import Settings, build_recipe
    from compress.recipe_distill import build_distill_recipe
    from compress.recipe_prune import build_prune_recipe

    if isinstance(options, Distill):
        return build_distill_recipe(options.settings(), base=options.recipe)
    if isinstance(options, Prune):
        recipe, notes = build_prune_recipe(options.settings(), base=options.recipe)
    elif isinstance(options, Quantize):
        recipe, notes = build_recipe(options.settings(), base=options.recipe)
    else:
        settings = Settings(seed=options.seed, model=options.model)
        recipe, notes = build_recipe(settings, base=options.recipe, overrides=options.overrides)
    for note in notes:
        view.warn(note)
    return recipe


def show_plan(recipe: Recipe, options: Run, view: View) -> None:
    """Plans the recipe and shows the plan.

    Raises:
        UserError: the plan has problems; they are shown first.
    """
    _environment.prepare(options.threads)
    _environment.import_models()
    from compress import pipeline

    if len(recipe.stages) > 1 or recipe.checks:
        from compress.workflows import staged_plan

        plans = staged_plan.plan(
            recipe,
            model=None,
            output=options.output,
            device=options.device,
            restart=options.restart,
            scored=not options.no_eval,
        )
        _stages_plan.show(plans, recipe, view)
        return
    plan = pipeline.plan(
        recipe, output=options.output, device=options.device, restart=options.restart, scored=not options.no_eval
    )
    views: dict[type, Callable[[Any, Recipe, View], None]] = {
        pipeline.Plan: _show_quantisation,
        pipeline.PrunePlan: _prune_plan.show,
        pipeline.WidthPlan: _width_plan.show,
        pipeline.CutPlan: _cut_plan.show,
        pipeline.DistillPlan: _distill_plan.show,
    }
    views[type(plan)](plan, recipe, view)
    warn_of_memory(plan.peak_memory_bytes, view)
    if plan.problems:
        count = "a problem" if len(plan.problems) == 1 else f"{len(plan.problems)} problems"
        raise UserError(f"the plan has {count}: " + "; ".join(plan.problems), plan.hint)


def _show_quantisation(plan: Plan, recipe: Recipe, view: View) -> None:
    view.table("Linears", ("LINEARS", ">COUNT", ">IN", ">OUT", "SCHEME", ">BITS/WEIGHT", "NOTE"), _rows(plan))
    view.result(_document(plan, recipe), _lines(plan))


def _document(plan: Plan, recipe: Recipe) -> dict[str, Any]:
    return {
        "model": plan.model,
        "method": plan.method,
        "output": plan.output,
        "recipe_hash": recipe.hash(),
        "bits_per_weight": plan.bits_per_weight,
        "file_bits_per_weight": plan.file_bits_per_weight,
        "refine_memory_bytes": plan.refine_memory_bytes,
        "curvature_memory_bytes": plan.curvature_memory_bytes,
        "curvature_disk_bytes": plan.curvature_disk_bytes,
        "experts_per_token": plan.experts_per_token,
        **costs(plan),
    }


def _lines(plan: Plan) -> list[str]:
    quantised = sum(linear.scheme is not None for linear in plan.linears)
    needs: list[tuple[str, str]] = []
    if plan.experts_per_token is not None:
        through, count = plan.experts_per_token
        needs.append(("experts", f"a calibration token goes through {through} of {count} in every mixture"))
    if plan.curvature_memory_bytes is not None:
        held, written = size(plan.curvature_memory_bytes), size(plan.curvature_disk_bytes)
        needs.append(("curvature", f"holds hidden states of all blocks: about {held} of memory, {written} on the disk"))
    if plan.refine_memory_bytes is not None:
        needs.append(("refine", f"holds the whole model: about {size(plan.refine_memory_bytes)} of memory"))
    return facts(
        (
            ("model", plan.model),
            ("method", plan.method),
            *needs,
            ("linears", f"{quantised} of {len(plan.linears)} quantised"),
            ("bits per weight", f"{number(plan.bits_per_weight)} (whole file {number(plan.file_bits_per_weight)})"),
            *cost_facts(plan),
        )
    )


def _rows(plan: Plan) -> list[tuple[object, ...]]:
    return by_kind(
        (
            each.name, each.in_features, each.out_features, each.scheme.label if each.scheme is not None else "kept",
            number(each.bits_per_weight), each.reason or "",
        )
        for each in plan.linears
    )  # fmt: skip

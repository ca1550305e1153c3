"""`compress run`: the run a recipe describes."""

from __future__ import annotations

from compress.commands._command import Outcome, command
from compress.commands._make import make
from compress.commands._options import MAKE
from compress.commands._output import View
from compress.commands._run_options import RunRecipe
from compress.commands._search_views import plan_search, run_search
from compress.commands.plan import build, show_plan
from compress.distillation.processes import shared_by


@command("run", RunRecipe, panel=MAKE)
def run(options: RunRecipe, view: View) -> Outcome:
    """Run a recipe. The recipe.yaml inside every artifact is one: it makes the same bytes again.

    Of several stages each works on the artifact of the one before; those before the last stay beside the output. A
    gate among them that does not pass ends the run there: exit code 1 where it failed, 3 where the data cannot decide;
    the artifact that it is about stays. A search in front makes several candidates, and the best of them goes on.

    Examples:

      $ compress run awq-w4-g128
      $ compress run my.yaml --model ./model --set stages.0.scheme.bits=3
      $ compress run prune-distill-quantize --model ./model --output ./small
      $ compress run ./artifact/recipe.yaml --output ./again
    """
    from compress.recipe_search import load_search

    search = load_search(options.recipe, options.overrides, model=options.model, seed=options.seed)
    with shared_by(options.processes):
        if search is not None:
            return plan_search(search, options, view) if options.dry_run else run_search(search, options, view)
        recipe = build(options, view)
        if not options.dry_run:
            return make(recipe, options, view)
        show_plan(recipe, options, view)
    return Outcome.OK

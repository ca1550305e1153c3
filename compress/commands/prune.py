"""`compress prune`: what matters least goes, scored against the parent."""

from __future__ import annotations

from compress.commands import _cut_target
from compress.commands._command import Outcome, command
from compress.commands._make import make
from compress.commands._options import MAKE
from compress.commands._output import View
from compress.commands._prune_options import Prune
from compress.commands.plan import build, show_plan


@command("prune", Prune, panel=MAKE)
def prune(options: Prune, view: View) -> Outcome:
    """Remove single weights, or whole neurons, heads, blocks and experts.

    With a sparsity or a pattern, weights become zero: the file stays dense, and common engines run it no faster. With
    --keep, every block loses as many neurons, or whole blocks or experts go, and stock transformers loads a really
    smaller model.

    Killed at any moment, the same command resumes and makes the same bytes. The finished artifact is scored against its
    parent on held-out text, unless --no-eval is given. Exit codes: 0 made or already complete, 2 a mistake in the
    request, 4 the work failed, 5 a damaged file.

    Examples:

      $ compress prune --method sparsegpt --sparsity 0.5
      $ compress prune ./model --method wanda --pattern 2:4 --output ./model-2of4
      $ compress prune ./model --recipe sparsegpt-2of4 --calib my_text.txt
      $ compress prune ./model --method width --keep 0.75
      $ compress prune ./model --method width --target-size 9MB
      $ compress prune ./model --method depth --keep 0.75
      $ compress prune ./model --method depth --target-speedup 1.5
      $ compress prune ./mixture --method experts --keep 0.75
      $ compress prune --method magnitude --sparsity 0.3 --dry-run
    """
    target, recipe = options.target(), build(options, view)
    if target is not None:
        recipe = _cut_target.aimed(target, recipe, options, view)
    if options.dry_run:
        show_plan(recipe, options, view)
    else:
        return make(recipe, options, view)
    return Outcome.OK

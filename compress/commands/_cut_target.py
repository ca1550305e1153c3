"""`--target-params`, `--target-size` and `--target-speedup` of prune: the `keep` that reaches one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.commands import _environment
from compress.commands._output import View
from compress.commands._prune_options import Prune

if TYPE_CHECKING:
    from compress.recipe import Recipe
    from compress.workflows.cut_target import CutTarget


def aimed(target: CutTarget, recipe: Recipe, options: Prune, view: View) -> Recipe:
    """The recipe with the `keep` that reaches the target, which is noted. Raises UserError where none does."""
    _environment.prepare(options.threads)
    _environment.import_models()
    from compress.workflows.cut_search import aim

    found = aim(recipe, target, output=options.output, device=options.device, progress=view.progress())
    view.note(f"keep {found.keep:g}: {found.parameters} of {found.all_parameters} parameters")
    if (speed := found.speedup) is not None:
        view.note(
            f"{target.speed}: {speed.estimate:.2f} times as fast as the source on this machine "
            f"({speed.low:.2f} to {speed.high:.2f}); a run that is killed goes on with --keep {found.keep:g}"
        )
    return found.recipe

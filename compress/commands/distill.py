"""`compress distill`: a student wins back what it lost, from the model that it was made from."""

from __future__ import annotations

from compress.commands._command import Outcome, command
from compress.commands._distill_options import Distill
from compress.commands._make import make
from compress.commands._options import MAKE
from compress.commands._output import View
from compress.commands.plan import build, show_plan
from compress.distillation.processes import shared_by


@command("distill", Distill, panel=MAKE)
def distill(options: Distill, view: View) -> Outcome:
    """Train a smaller or pruned model to answer as its teacher does.

    The student is any model directory or artifact with the teacher's tokenizer: a dense model, or one that was pruned.
    Zeros of a pruned student stay zero. What is kept are the weights with the lowest KL to the teacher on windows held
    out of the training text.

    Killed at any moment, the same command resumes and makes the same bytes. A run by --minutes measures at its start
    how many steps they are; its recipe.yaml holds them and makes the same bytes again. The finished artifact is scored
    against the teacher, unless --no-eval is given. Exit codes: 0 made or already complete, 2 a mistake in the request,
    4 the work failed (the loss is NaN, the disk full), 5 a damaged file or other tokenizers.

    Examples:

      $ compress distill --student ./tales-keep75
      $ compress distill --teacher ./model --student ./narrow --minutes 30 --full
      $ compress distill --student ./sparse --loss jsd --data my_text.txt
      $ compress distill --student ./small --data prompts.jsonl --answers 128
      $ compress distill --teacher ./model --student ./small --processes 4
      $ compress distill --teacher ./model --student ./small --dry-run
    """
    recipe = build(options, view)
    with shared_by(options.processes):
        if not options.dry_run:
            return make(recipe, options, view)
        show_plan(recipe, options, view)
    return Outcome.OK

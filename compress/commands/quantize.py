"""`compress quantize`: a smaller model from a model, scored against its parent."""

from __future__ import annotations

from compress.commands import _budget
from compress.commands._command import Outcome, command
from compress.commands._make import make
from compress.commands._options import MAKE
from compress.commands._output import View
from compress.commands._quantize_options import Quantize
from compress.commands.plan import build, show_plan


@command("quantize", Quantize, panel=MAKE)
def quantize(options: Quantize, view: View) -> Outcome:
    """Quantise the linears of a model's decoder blocks, block by block.

    Killed at any moment, the same command resumes and makes the same bytes. The finished artifact is scored against
    its parent on held-out text, unless --no-eval is given. Exit codes: 0 made or already complete, 2 a mistake in the
    request, 4 the work failed, 5 a damaged file.

    Examples:

      $ compress quantize --method awq --bits 4
      $ compress quantize ./model --method gptq --bits 3 --output ./model-w3
      $ compress quantize ./model --recipe my.yaml --calib my_text.txt
      $ compress quantize --scheme W8A16 --group-size channel --dry-run
      $ compress quantize ./model --method smoothquant --scheme W8A8
      $ compress quantize ./model --scheme FP8_DYNAMIC
      $ compress quantize ./model --target-bits 4.25
      $ compress quantize ./model --max-kl 0.02
      $ compress quantize ./model --method gptq --bits 4 --format gptq
    """
    target, recipe = _budget.wanted(options), build(options, view)
    if target is not None and options.dry_run:
        _budget.show_plan_within(target, recipe, options, view)
    elif target is not None:
        _budget.make_within(target, recipe, options, view)
    elif options.dry_run:
        show_plan(recipe, options, view)
    else:
        return make(recipe, options, view)
    return Outcome.OK

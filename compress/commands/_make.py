"""What `quantize`, `prune` and `run` do with a recipe: one library call, then what it made and what that lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compress.artifact.cut import stages
from compress.artifact.scores import scored_against, task_scores
from compress.commands import _environment
from compress.commands._command import Outcome
from compress.commands._distill_options import Distill
from compress.commands._gate_views import OUTCOMES, verdict_table
from compress.commands._output import View, duration, number, relative, size
from compress.commands._prune_options import Prune
from compress.commands._quantize_options import Quantize
from compress.commands._run_options import RunRecipe
from compress.commands._scores import score_rows

if TYPE_CHECKING:
    from compress.recipe import Recipe
    from compress.workflows.quantize import QuantizeResult


def make(recipe: Recipe, options: Quantize | Prune | Distill | RunRecipe, view: View) -> Outcome:
    """Runs the recipe and shows the result; the path of the artifact goes to stdout. Returns what its gates said."""
    _environment.prepare(options.threads)
    _environment.import_models()
    from compress.workflows.quantize import quantize

    result = quantize(
        recipe,
        output=options.output,
        device=options.device,
        restart=options.restart,
        evaluate=not options.no_eval,
        eval_tokens=options.eval_tokens,
        progress=view.progress(),
    )
    show_made(result, view)
    return gates_said(result, recipe, view)


def gates_said(result: QuantizeResult, recipe: Recipe, view: View) -> Outcome:
    """The table of every gate, and which stage the run ended behind."""
    for verdict in result.verdicts:
        verdict_table(verdict, view)
    if result.stopped is None:
        return Outcome.OK
    verdict, stage = result.verdicts[-1], recipe.stages[result.stopped - 1]
    view.warn(
        f"gate {verdict.policy}: {verdict.verdict}; the run ended behind stage {result.stopped} of "
        f"{len(recipe.stages)} ({stage.kind} {stage.method.kind}), whose artifact stays: "
        f"{relative(result.artifact.path)}"
    )
    return OUTCOMES[verdict.verdict]


def show_made(result: QuantizeResult, view: View, more: Mapping[str, Any] | None = None) -> None:
    """What a run made, as a table, and as the command's result with `more` in its document."""
    artifact, manifest = result.artifact, result.artifact.manifest
    sizes = manifest.sizes
    if result.complete_already:
        view.note("complete already: this recipe, source and calibration text made what is there")
    elif result.resumed_blocks:
        what = "blocks" if artifact.training() is None else "steps"
        view.note(f"resumed after {result.resumed_blocks} finished {what}, computed {result.computed_blocks}")
    rows: list[tuple[str, str, str]] = [
        ("weight files", size(manifest.parents[-1].bytes), size(sizes.bytes)),
        *_amount_rows(result),
        *_training_rows(result),
        ("bits per weight, whole file", "", number(sizes.file_bits_per_weight)),
        *score_rows(result.evaluation),
    ]
    title = f"{manifest.parents[-1].name}: {artifact.method}, {artifact.scheme}, {duration(result.seconds)}"
    view.table(title, ("", ">PARENT", ">ARTIFACT"), rows)
    if (against := scored_against(result.evaluation, manifest.parents)) is not None:
        view.warn(f"the attached scores are against {against}, not against the parent")
    for fallback in manifest.fallbacks:
        view.warn(f"{fallback.name}: {fallback.action} ({fallback.reason})")
    if result.not_scored is not None:
        later = f"compress eval {relative(artifact.path)} --baseline MODEL --attach"
        view.note(f"not scored: {result.not_scored}; later: {later}")
    view.result(_document(result) | dict(more or {}), [relative(artifact.path)])


def _amount_rows(result: QuantizeResult) -> list[tuple[str, str, str]]:
    from compress.artifact.card import removed, zeros  # it brings the template engine

    layers, sizes = result.artifact.layers(), result.artifact.manifest.sizes
    pruned, lost = zeros(layers), removed(layers)
    if lost:
        share = f"{100 * sizes.parameters / (sizes.parameters + lost):.2f}%"
        return [("parameters", str(sizes.parameters + lost), str(sizes.parameters)), ("parameters kept", "", share)]
    rows = [] if pruned is None else [("zeros in the pruned linears", "", f"{100 * pruned['share']:.2f}%")]
    if sizes.bits_per_weight is not None:
        rows.append(("bits per weight, quantised linears", "", number(sizes.bits_per_weight)))
    return rows


def _training_rows(result: QuantizeResult) -> list[tuple[str, str, str]]:
    learned, cut = result.artifact.training(), result.artifact.cut()
    before = [(f"KL {done}", "", number(kl)) for done, kl, _ in stages(cut)]
    if learned is None:
        return before
    steps = f"{learned['best_step']} of {learned['done']}" + (", stopped early" if learned["stopped_early"] else "")
    start, end = learned["held_out"][0]["kl"], learned["written_kl"]
    return [*before[:2], ("held-out KL to the teacher", number(start), number(end)), ("best step", "", steps)]


def _document(result: QuantizeResult) -> dict[str, Any]:
    from compress.artifact.card import removed, zeros  # it brings the template engine

    manifest, layers = result.artifact.manifest, result.artifact.layers()
    evaluation = result.evaluation
    pruned = {"zeros": zeros(layers)} if zeros(layers) else {}
    narrowed = {"removed_parameters": removed(layers)} if removed(layers) else {}
    return {
        "artifact": result.artifact.path,
        "artifact_id": manifest.artifact_id,
        "complete_already": result.complete_already,
        "resumed_blocks": result.resumed_blocks,
        "computed_blocks": result.computed_blocks,
        "seconds": result.seconds,
        "method": result.artifact.method,
        "scheme": result.artifact.scheme,
        "recipe_hash": manifest.recipe_hash,
        "parent": manifest.parents[-1],
        "sizes": manifest.sizes,
        "fallbacks": manifest.fallbacks,
        "summary": evaluation["texts"][0]["summary"] if evaluation and evaluation["texts"] else None,
        "tasks": task_scores(evaluation),
        "not_scored": result.not_scored,
        "gates": [verdict.model_dump(mode="json") for verdict in result.verdicts],
        "stopped_behind_stage": result.stopped,
        **pruned,
        **narrowed,
        **({"cut": cut} if (cut := result.artifact.cut()) is not None else {}),
        **({"training": learned} if (learned := result.artifact.training()) is not None else {}),
    }

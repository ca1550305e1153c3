"""`compress show`: what an artifact is and what it lost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.commands._command import command
from compress.commands._options import LOOK, Common
from compress.commands._output import View, facts, number, relative, size

if TYPE_CHECKING:
    from compress.artifact.manifest import Parent
    from compress.artifact.reader import Artifact
    from compress.artifact.scores import Score, TaskScore


@dataclass(frozen=True, kw_only=True)
class Show(Common):
    """Options of `compress show`."""

    artifact: Annotated[Path, typer.Argument(help="An artifact directory.", metavar="ARTIFACT", show_default=False)]
    worst: Annotated[int, typer.Option(min=0, help="How many of the worst layers to show.")] = 5


@command("show", Show, panel=LOOK)
def show(options: Show, view: View) -> None:
    """Show an artifact: how it was made, its sizes, its scores, its fallbacks and its worst layers.

    Examples:

      $ compress show artifacts/tales-6m-awq-w4a16-g128/latest
      $ compress show ./artifact --worst 20
      $ compress show ./artifact --json
    """
    from compress.artifact.cut import stages
    from compress.artifact.reader import Artifact
    from compress.artifact.scores import further_texts, generation_scores, headline_scores, scored_against, task_scores
    from compress.artifact.training import curve_rows

    artifact = Artifact.open(options.artifact)
    layers = artifact.layers()
    measured = [layer for layer in layers if layer.get("output_error") is not None]
    worst = sorted(measured, key=lambda layer: -layer["output_error"])[: options.worst]
    kept = [layer for layer in layers if layer.get("scheme") is None]
    record = artifact.eval()
    scores, tasks = headline_scores(record), task_scores(record)
    against = scored_against(record, artifact.manifest.parents)
    more = {**further_texts(record), "generation": generation_scores(record)}
    document = {**_document(artifact, layers, worst, kept, scores), "tasks": tasks, "further_scores": more}
    document["scored_against"] = against
    view.result(document, _lines(artifact, layers, kept, scores, against))
    for name, further in more.items():
        if further:
            values = [(key.replace("_", " "), score_text(score)) for key, score in further.items()]
            view.table(f"Scores: {name}", ("", ">VALUE"), values)
    if tasks:
        before = ">PARENT" if against is None else f">{against}"
        view.table(
            "Tasks", ("TASK", ">ITEMS", before, ">ARTIFACT", ">FLIPS", "NOTE"), [_task_row(task) for task in tasks]
        )
    fallbacks = artifact.manifest.fallbacks
    if fallbacks:
        view.table("Fallbacks", ("NAME", "DONE INSTEAD", "WHY"), [(f.name, f.action, f.reason) for f in fallbacks])
    if kept:
        view.table("Left as they were", ("LINEAR", "WHY"), [(layer["name"], layer.get("reason")) for layer in kept])
    if lost := stages(artifact.cut()):
        view.table("KL, step by step", ("", ">KL", "ON"), [(done, number(kl), text) for done, kl, text in lost])
    if (learned := artifact.training()) is not None:
        points = [(step, number(kl), number(loss)) for step, kl, loss in curve_rows(learned)]
        view.table("Training", (">STEP", ">HELD-OUT KL", ">MEAN LOSS BEFORE"), points)
    if (draft := artifact.draft()) is not None:
        accepted = f"{100 * draft['acceptance']:.1f}% of {draft['proposed']}"
        drafted = [("accepted", accepted), ("tokens per step", number(draft["tokens_per_step"]))]
        view.table(f"As a draft for {draft['target']}", ("", f">{draft['draft_tokens']} AT A TIME"), drafted)
    if worst:
        rows = [(w["name"], w["scheme"], number(w["output_error"]), number(w.get("weight_sqnr_db"))) for w in worst]
        view.table("Largest output errors", ("LINEAR", "SCHEME", ">RELATIVE ERROR", ">WEIGHT SQNR, dB"), rows)


def _done(artifact: Artifact) -> str:
    """What was done to the linears by the last stage that changes weights."""
    words = {"quantize": "quantised", "prune": "pruned", "distill": "trained"}
    return next((words[parent.stage] for parent in artifact.manifest.parents[::-1] if parent.stage in words), "changed")


def _document(
    artifact: Artifact,
    layers: list[dict[str, Any]],
    worst: list[dict[str, Any]],
    kept: list[dict[str, Any]],
    scores: dict[str, Score],
) -> dict[str, Any]:
    manifest = artifact.manifest
    return {
        "path": artifact.path,
        "artifact_id": manifest.artifact_id,
        "version": manifest.version,
        "created": manifest.created,
        "created_with": manifest.created_with,
        "method": artifact.method,
        "scheme": artifact.scheme,
        "parents": manifest.parents,
        "recipe": manifest.recipe,
        "recipe_hash": manifest.recipe_hash,
        "calibration": manifest.calibration,
        "sizes": manifest.sizes,
        "scores": scores,
        "fallbacks": manifest.fallbacks,
        "layers": {"count": len(layers), "kept": [layer["name"] for layer in kept], "worst": worst},
        "environment": manifest.environment,
        "attachments": manifest.attachments,
        **({"cut": cut} if (cut := artifact.cut()) is not None else {}),
        **({"draft": draft} if (draft := artifact.draft()) is not None else {}),
        **({"training": learned} if (learned := artifact.training()) is not None else {}),
    }


def _lines(
    artifact: Artifact,
    layers: list[dict[str, Any]],
    kept: list[dict[str, Any]],
    scores: dict[str, Score],
    against: str | None,
) -> list[str]:
    manifest = artifact.manifest
    sizes, calibration = manifest.sizes, manifest.calibration
    text = None
    if calibration is not None:
        text = f"{calibration.samples} x {calibration.seq_len} tokens of {calibration.name}, seed {calibration.seed}"
    bits = number(sizes.bits_per_weight)
    pairs: list[tuple[str, object]] = [
        ("artifact", relative(artifact.path)),
        ("id", manifest.artifact_id),
        ("version", f"{manifest.version}, made {manifest.created} by {manifest.created_with}"),
        ("made from", lineage_text(manifest.parents)),
        ("method", artifact.method),
        ("scheme", artifact.scheme),
        ("cache", _cache(manifest.recipe)),
        ("calibration", text),
        ("size", f"{size(sizes.bytes)}, {sizes.ratio_to_root:.1%} of {manifest.parents[0].name}"),
        ("bits per weight", f"{bits} (whole file {number(sizes.file_bits_per_weight)})"),
        ("linears", f"{len(layers) - len(kept)} {_done(artifact)}, {len(kept)} left as they were"),
        ("fallbacks", len(manifest.fallbacks)),
    ]
    if against is not None:
        pairs.append(("scored against", f"{against}, not the parent {manifest.parents[-1].name}"))
    pairs += [(name.replace("_", " "), score_text(score)) for name, score in scores.items()]
    pairs += [("gate", text) for text in _verdicts(artifact)]
    if not scores:
        pairs.append(("scores", f"none yet: compress eval {relative(artifact.path)}"))
    return facts(pairs)


def _cache(recipe: Mapping[str, Any]) -> str | None:
    """What the artifact stores for the key and value cache, in words; None for nothing."""
    kinds = [stage["kv_cache"] for stage in recipe["stages"] if stage.get("kv_cache")]
    return f"calibrated scales of keys and values, {kinds[-1]}" if kinds else None


def lineage_text(parents: Sequence[Parent]) -> str:
    """`model (digest) --prune--> ... --quantize--> this`; a teacher is named where it taught."""
    text, taught = "", ""
    for parent in parents:
        name = f"{parent.name} ({parent.digest[:12]})"
        if parent.stage == "teach":
            taught = f", taught by {name}"
        else:
            text, taught = f"{text}{name} --{parent.stage}{taught}--> ", ""
    return f"{text}this"


def _verdicts(artifact: Artifact) -> list[str]:
    """What the gates said that a recipe held this artifact to, as they are attached."""
    names = sorted(name for name in artifact.manifest.attachments if name.startswith("verdict"))
    found = [json.loads(artifact.attachment(name) or b"{}") for name in names]
    return [f"{verdict.get('policy')}: {verdict.get('verdict')}" for verdict in found]


def _task_row(task: TaskScore) -> tuple[object, ...]:
    parent = "" if task.baseline is None else f"{task.baseline.value:.1%}"
    flips = "" if task.flips is None else f"{task.flips / task.items:.1%}"
    return task.name, task.items, parent, f"{task.accuracy.value:.1%}", flips, task.why_not or ""


def score_text(score: Score) -> str:
    """`36.02 [35.10, 36.95]`."""
    if score.low is None or score.high is None:
        return number(score.value)
    return f"{number(score.value)} [{number(score.low)}, {number(score.high)}]"

"""README.md of an artifact: a Hugging Face model card rendered from manifest, layers.json and eval.json alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from compress.artifact.coverage import coverage
from compress.artifact.cut import stages
from compress.artifact.manifest import Manifest
from compress.artifact.scores import (
    further_texts,
    generation_scores,
    headline_scores,
    overlaps,
    scored_against,
    task_scores,
)
from compress.artifact.summary import recipe_summary
from compress.artifact.training import curve_rows

_TEMPLATE = "card.md.j2"


def render(
    manifest: Manifest,
    config: Mapping[str, Any],
    layers: Sequence[Mapping[str, Any]],
    evaluation: Mapping[str, Any] | None,
    training: Mapping[str, Any] | None = None,
    cut: Mapping[str, Any] | None = None,
    draft: Mapping[str, Any] | None = None,
    kernels: Mapping[str, Any] | None = None,
) -> str:
    """The card as Markdown with YAML front matter, from the manifest and the content of config and the attachments:
    layers.json, eval.json, training.json, cut.json, draft.json and kernels.json.

    The same inputs give the same text; attachments in the manifest are not looked at.
    """
    summary = recipe_summary(manifest.recipe)
    text = _template().render(
        manifest=manifest,
        root=manifest.parents[0],
        parent=manifest.parents[-1],
        summary=summary,
        name="-".join(part for part in (manifest.parents[0].name, summary.method, summary.scheme) if part != "-"),
        blocks=block_rows(layers) if training is None else [],
        zeros=zeros(layers),
        pattern=any(str(layer.get("scheme") or "").endswith("of4") for layer in layers),
        removed=removed(layers),
        coverage=coverage(layers),
        kept=[layer for layer in layers if layer.get("scheme") is None],
        scores=headline_scores(evaluation),
        against=scored_against(evaluation, manifest.parents),
        overlaps=overlaps(evaluation),
        text=_text_of(evaluation),
        more={**further_texts(evaluation), "greedy answers": generation_scores(evaluation)},
        tasks=task_scores(evaluation),
        evaluation=evaluation,
        actions=_action_counts(manifest),
        training=training,
        draft=draft,
        kernels=kernels,
        stages=stages(cut),
        curve=curve_rows(training) if training else [],
        quantization=config.get("quantization_config") or {},
    )
    return text.rstrip("\n") + "\n"


@functools.cache
def _template() -> Template:
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters["quantity"] = _quantity
    environment.filters["share"] = lambda value: f"{100 * value:.1f}%"
    environment.filters["cell"] = _cell
    source = resources.files("compress.artifact").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source)


def in_order(block: int | None) -> tuple[bool, int]:
    """What sorts blocks, those of none last."""
    return block is None, block or 0


def block_rows(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per decoder block, in order: how many linears were changed, and the mean and the worst of their errors."""
    rows = []
    for block in sorted({layer["block"] for layer in layers}, key=in_order):
        members = [layer for layer in layers if layer["block"] == block and layer.get("scheme") is not None]
        errors = {layer["name"]: e for layer in members if (e := layer.get("output_error")) is not None}
        sqnr = [s for layer in members if (s := layer.get("weight_sqnr_db")) is not None]
        worst = max(errors, key=lambda name: errors[name]) if errors else None
        rows.append(
            {
                "block": "outside" if block is None else block,
                "linears": len(members),
                "mean_error": sum(errors.values()) / len(errors) if errors else None,
                "worst": worst,
                "worst_error": errors[worst] if worst else None,
                "mean_sqnr_db": sum(sqnr) / len(sqnr) if sqnr else None,
            }
        )
    return rows


def zeros(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Of the linears that were pruned: weights, how many of them are zero, their share; None where none was."""
    pruned = [layer["details"] for layer in layers if "zeros" in (layer.get("details") or {})]
    if not pruned:
        return None
    weights, none = sum(each["weights"] for each in pruned), sum(each["zeros"] for each in pruned)
    return {"linears": len(pruned), "weights": weights, "zeros": none, "share": none / weights}


def removed(layers: Sequence[Mapping[str, Any]]) -> int:
    """How many parameters went with neurons and heads, rows, columns and biases."""
    return sum((layer.get("details") or {}).get("removed", 0) for layer in layers)


def _text_of(evaluation: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The `data` of the first text that was scored: its name, its tokens; None in records that have no such list."""
    texts = (evaluation or {}).get("texts")
    data = texts[0].get("data") if isinstance(texts, list) and texts and isinstance(texts[0], Mapping) else None
    return data if isinstance(data, Mapping) else None


def _action_counts(manifest: Manifest) -> dict[str, int]:
    counts: dict[str, int] = {}
    for entry in manifest.ledger.values():
        counts[entry.action] = counts.get(entry.action, 0) + 1
    return dict(sorted(counts.items()))


def _quantity(size: int) -> str:
    """Bytes for people: `4.12 MB` (powers of 1000, as disks and hubs count)."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size} bytes"


def _cell(value: Any) -> str:
    """A table cell: four significant digits for a float, a dash for None, and no character that ends the cell."""
    if value is None:
        return "-"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")

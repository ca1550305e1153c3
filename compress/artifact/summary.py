"""What a recipe amounts to in two words, for lists, cards and directory names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compress.schemes import FIXED_SCHEMES, table_label
from compress.types import IntScheme, Scheme, Sparsity

MIXED = "mixed"


@dataclass(frozen=True, slots=True)
class RecipeSummary:
    """`method`: the stages' methods joined by `+`; `scheme`: the last's layout or sparsity; `bits`: code width.

    Where linears have schemes of their own, `scheme` is `mixed` and `bits` None.
    """

    method: str
    scheme: str
    bits: int | None


def recipe_summary(recipe: Mapping[str, Any]) -> RecipeSummary:
    """Summarise a resolved recipe as plain data (a manifest's `recipe`); unknown parts read as `-`."""
    stages = [stage for stage in recipe.get("stages") or [] if isinstance(stage, Mapping)]
    methods = [method for stage in stages for method in _methods(stage)]
    schemes = [found for stage in stages if (found := _scheme(stage.get("scheme"))) is not None]
    last = schemes[-1] if schemes else None
    tables = _tables(stages[-1]) if last is not None else ""
    if last is not None and stages[-1].get("overrides"):
        return RecipeSummary(method="+".join(methods) or "-", scheme=MIXED + tables, bits=None)
    return RecipeSummary(
        method="+".join(methods) or "-",
        scheme=last.label + tables if last else _sparsity(stages[-1]) if stages else "-",
        bits=last.bits if last else None,
    )


def _methods(stage: Mapping[str, Any]) -> list[str]:
    """The stage's method, and `refine` where it is refined afterwards."""
    method = stage.get("method")
    kind = method.get("kind") if isinstance(method, Mapping) else method
    return [kind, *(["refine"] if stage.get("refine") else [])] if isinstance(kind, str) else []


def _tables(stage: Mapping[str, Any]) -> str:
    """What the label says of embedding and head."""
    configs = (_scheme(stage.get(name)) for name in ("embeddings", "head"))
    return table_label(*(None if config is None else config.bits for config in configs))


def _sparsity(stage: Mapping[str, Any]) -> str:
    share, pattern = stage.get("sparsity"), stage.get("pattern")
    if isinstance(rank := stage.get("lora_rank"), int):
        return f"lora{rank}" if rank else "full"
    if isinstance(pattern, str):
        return Sparsity.parse(pattern).label
    if isinstance(keep := stage.get("keep"), float):
        return f"keep{100 * keep:g}"
    if not isinstance(share, float):
        return "-"
    allocation = stage.get("allocation", "uniform")
    return Sparsity(share).label + ("" if allocation == "uniform" else f"-{allocation}")


def _scheme(scheme: Any) -> Scheme | None:
    """The layout that a stage's `scheme` says; None where it says none that is known."""
    if not isinstance(scheme, Mapping):
        return None
    if "name" in scheme:
        return FIXED_SCHEMES.get(str(scheme["name"]))
    if "bits" not in scheme:
        return None
    group = scheme.get("group_size")
    size = group if isinstance(group, int) else None
    return IntScheme(int(scheme["bits"]), size, bool(scheme.get("symmetric", True)))

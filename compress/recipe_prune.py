"""A pruning recipe from single settings: what the flags of `compress prune` and `compress.prune` mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import UserError
from compress.pruning.configs import PRUNING
from compress.recipe import Recipe, parse_recipe
from compress.recipe_build import add_ignored, only_stage, set_calibration, set_method
from compress.recipe_yaml import find_recipe, read_yaml

DEFAULT_METHOD = "sparsegpt"
STRUCTURED_METHOD = "width"
DEFAULT_SPARSITY = 0.5
UNDECIDED = 0.5
"""The `keep` of a recipe whose own will be found by a target."""
FLAGS_HINT = "`compress methods` lists methods and their settings; `compress prune --help` the options"


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneSettings:
    """Settings of one pruning, each None (or empty) where not given."""

    method: str | None = None
    sparsity: float | None = None
    pattern: str | None = None
    keep: float | None = None
    repair: bool | None = None
    allocation: str | None = None
    format: str | None = None
    stats: str | None = None
    ignore: Sequence[str] = ()
    calib: str | None = None
    samples: int | None = None
    seq_len: int | None = None
    seed: int | None = None
    model: str | None = None


def build_prune_recipe(settings: PruneSettings, *, base: str | Path | None = None) -> tuple[Recipe, list[str]]:
    """The recipe of `settings` over the recipe `base` (a file or a shipped name).

    Returns:
        The recipe, and notes on settings that have no effect with the chosen method.

    Raises:
        UserError: more than one amount, a repair setting for a method without repair, a base that does not prune or
            has several stages, or a result that is no valid recipe.
    """
    amounts = {"sparsity": settings.sparsity, "pattern": settings.pattern, "keep": settings.keep}
    if len(given := [key for key, value in amounts.items() if value is not None]) > 1:
        raise UserError(
            f"{given[0]} {amounts[given[0]]} and {given[1]} {amounts[given[1]]} were both given",
            "give one: a pattern n:m or a sparsity for single weights, keep for whole neurons and heads",
        )
    if base is None:
        data: dict[str, Any] = {"version": 1, "stages": [{"kind": "prune"}]}
    else:
        data = read_yaml(find_recipe(base))
    stage = only_stage(data, base)
    if stage.get("kind") != "prune":
        raise UserError(f"recipe {base} does not prune", "use `compress run` or `compress quantize` with it")
    for key, value in (("model", settings.model), ("seed", settings.seed)):
        if value is not None:
            data[key] = value
    set_method(stage, settings.method, DEFAULT_METHOD if settings.keep is None else STRUCTURED_METHOD)
    _set_repair(stage, settings.repair)
    of_model = _set_statistics(stage, settings.stats)
    _set_amount(stage, settings)
    for key, value in (("allocation", settings.allocation), ("format", settings.format), ("stats", settings.stats)):
        if value is not None:
            stage[key] = value
    add_ignored(stage, settings.ignore)
    notes = set_calibration(stage, settings, PRUNING) + of_model
    if base is None:
        return parse_recipe(data, "the request", root="stages.0.", hint=FLAGS_HINT), notes
    return parse_recipe(data, f"recipe {base}"), notes


def _set_amount(stage: dict[str, Any], settings: PruneSettings) -> None:
    amounts = {"sparsity": settings.sparsity, "pattern": settings.pattern, "keep": settings.keep}
    given = {key: value for key, value in amounts.items() if value is not None}
    config = PRUNING.get(str(stage["method"].get("kind") if isinstance(stage["method"], dict) else stage["method"]))
    if given:
        for key in amounts:
            stage.pop(key, None)
        stage |= given
    elif not any(key in stage for key in amounts) and not (config is not None and config.structured):
        stage["sparsity"] = DEFAULT_SPARSITY


def _set_repair(stage: dict[str, Any], repair: bool | None) -> None:
    if repair is None:
        return
    method = stage["method"]
    method = {"kind": method} if isinstance(method, str) else method
    config = PRUNING.get(str(method.get("kind")))
    if config is not None and "repair" not in config.model_fields:
        raise UserError(f"{method['kind']} has no repair to leave out", "use --no-repair with --method width")
    stage["method"] = {**method, "repair": repair}


def _set_statistics(stage: dict[str, Any], stats: str | None) -> list[str]:
    """With a directory for statistics, what goes is chosen by what does not change with the amount; says so."""
    method = stage["method"]
    method = {"kind": method} if isinstance(method, str) else method
    setting = next((name for name in ("norms", "moments", "measured") if name in _settings_of(method)), None)
    if stats is None or setting is None or setting in method or _keeps_already(method):
        return []
    added: dict[str, str] = {setting: "model"}
    if method["kind"] == "experts" and method.get("choose", "error") == "error":
        added["choose"] = "saliency"  # what is lost without an expert is another with every amount
    stage["method"] = {**method, **added}
    settings = ", ".join(f"{name}: {value}" for name, value in added.items())
    return [
        f"--stats: {method['kind']} reads statistics of the model before any of it is pruned ({settings}), which "
        "other amounts share"
    ]


def _keeps_already(method: dict[str, Any]) -> bool:
    """Whether a width cut measures gradients or channels of the whole model, which is what is kept then."""
    gradients, channels = method.get("importance") in ("taylor", "logits"), method.get("hidden", 1) != 1
    return method["kind"] == "width" and (gradients or channels)


def _settings_of(method: dict[str, Any]) -> frozenset[str]:
    config = PRUNING.get(str(method.get("kind")))
    return frozenset() if config is None else frozenset(config.model_fields)

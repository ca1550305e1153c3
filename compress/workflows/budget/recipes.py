"""The recipe that says a choice, and what is asked of the recipe that a search starts from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compress.errors import UserError
from compress.recipe import Recipe
from compress.recipe_sections import SchemeConfig
from compress.stages import Override, QuantizeStage
from compress.types import IntScheme
from compress.workflows.budget.units import Unit


def open_stage(recipe: Recipe) -> QuantizeStage:
    """The stage whose schemes a search chooses.

    Raises:
        UserError: the recipe is not one quantisation with integer weights, or gives linears schemes already.
    """
    stage = recipe.stages[0]
    if len(recipe.stages) != 1 or not isinstance(stage, QuantizeStage):
        raise UserError("a budget needs a recipe of one quantising stage", "remove the other stages")
    if recipe.checks:
        raise UserError("a budget is not held to a recipe's gates", "remove them, and use `compress gate` afterwards")
    if stage.overrides:
        raise UserError(
            "the recipe gives linears schemes of their own already", "remove its `overrides`, or the budget"
        )
    if not isinstance(stage.scheme, SchemeConfig):
        raise UserError(
            f"a budget chooses among integer weights, and the recipe asks for {stage.scheme.name}", "remove its scheme"
        )
    return stage


def neutral(recipe: Recipe) -> Recipe:
    """The recipe with a scheme that fits every linear, so that no width forbids it."""
    stage = open_stage(recipe)
    return _with(recipe, IntScheme(8, None, stage.scheme.to_scheme().symmetric), [])


def chosen_recipe(recipe: Recipe, units: Sequence[Unit], choice: Sequence[IntScheme]) -> Recipe:
    """The recipe that gives each unit its chosen scheme: the commonest (by weights) as the stage's, others by name."""
    weights: dict[IntScheme, int] = {}
    names: dict[IntScheme, list[str]] = {}
    tables: dict[str, SchemeConfig] = {}
    for unit, scheme in zip(units, choice, strict=True):
        if unit.table is not None:
            tables[unit.table] = _config(scheme)
            continue
        weights[scheme] = weights.get(scheme, 0) + unit.weights
        names.setdefault(scheme, []).extend(spec.name for spec in unit.linears)
    ordered = sorted(weights, key=lambda scheme: (scheme.bits, -(scheme.group_size or 1 << 62)))
    commonest = max(ordered, key=lambda scheme: weights[scheme])
    overrides = [Override(linears=names[scheme], scheme=_config(scheme)) for scheme in ordered if scheme != commonest]
    return _with(recipe, commonest, overrides, tables)


def _with(
    recipe: Recipe, scheme: IntScheme, overrides: list[Override], tables: Mapping[str, SchemeConfig] | None = None
) -> Recipe:
    update = {"scheme": _config(scheme), "overrides": overrides, **(tables or {})}
    stage = open_stage(recipe).model_copy(update=update)
    return recipe.model_copy(update={"stages": [stage]})


def _config(scheme: IntScheme) -> SchemeConfig:
    size = scheme.group_size or "channel"
    return SchemeConfig.model_validate({"bits": scheme.bits, "group_size": size, "symmetric": scheme.symmetric})

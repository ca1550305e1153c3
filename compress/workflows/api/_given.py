"""What the verbs of the Python API are given, made whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compress.recipe_build import Settings, build_recipe

if TYPE_CHECKING:
    from compress.artifact.reader import Artifact
    from compress.recipe import Recipe
    from compress.workflows.quantize import QuantizeResult

PathLike = str | Path


def model_or_packaged(model: PathLike | None) -> PathLike:
    """The model that was named, or the one that ships in the package."""
    from compress.content import default_model

    return default_model() if model is None else model


def whole_recipe(recipe: Recipe | PathLike | None, settings: Settings) -> Recipe:
    """The recipe of a call. UserError where it was given whole and in single settings too."""
    from compress.errors import UserError
    from compress.recipe import Recipe

    if not isinstance(recipe, Recipe):
        return build_recipe(settings, base=recipe)[0]
    if settings != Settings(ignore=settings.ignore) or settings.ignore:
        raise UserError("a Recipe and single settings were both given", "put the settings into the recipe")
    return recipe


def let_through(result: QuantizeResult) -> Artifact:
    """The artifact of a run that no gate ended. Raises WorkError for one that a gate of the recipe ended."""
    from compress.errors import WorkError

    if result.stopped is None:
        return result.artifact
    verdict = result.verdicts[-1]
    raise WorkError(
        f"gate {verdict.policy}: {verdict.verdict} behind stage {result.stopped} of the recipe",
        f"the artifact stays, with its verdict: {result.artifact.path}",
    )

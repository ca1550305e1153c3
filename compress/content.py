"""The one place that finds the content shipped with the package: recipes, texts, policies, the packaged model.

In a wheel the content lies under `compress/`; an editable install maps it there from the checkout's top level.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from compress.errors import UserError


def _content(name: str) -> Path:
    return Path(str(files("compress").joinpath(name)))


def recipes_dir() -> Path:
    """The directory of shipped recipes."""
    return _content("recipes")


def recipe_path(name: str) -> Path:
    """A shipped recipe by its name without `.yaml`. Raises UserError naming the ones there are."""
    path = recipes_dir() / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in recipes_dir().glob("*.yaml")))
        raise UserError(f"there is no shipped recipe {name!r}", f"choose from {names}, or give a path")
    return path


def calibration_dir() -> Path:
    """The directory of shipped calibration texts."""
    return _content("calib_data")


def eval_dir() -> Path:
    """The directory of shipped evaluation content: gate policies and held-out texts."""
    return _content("eval")


def default_model() -> Path:
    """The small trained model that ships in the package."""
    return Path(str(files("compress").joinpath("packaged", "tales-6m")))

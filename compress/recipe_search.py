"""A recipe that begins with a search: candidates that are made alike small, taught alike, and ranked by what they lose.

The winner's stages take the place of the search, so that what comes out has a recipe like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, StrictInt, StrictStr, ValidationError

from compress.errors import UserError
from compress.recipe import HINT, Recipe, parse_recipe
from compress.recipe_problems import describe
from compress.recipe_sections import Section
from compress.recipe_yaml import apply_override, find_recipe, read_yaml
from compress.stages import QuantizeStage


class SearchStage(Section):
    """The first stage of a recipe that searches.

    candidates: a name and the stages of each. recover: stages that every candidate gets behind its own, mostly a short
    distillation, by `steps` so that all learn from as many tokens. tokens: held-out tokens of `data` (a packaged text
    or a file) that KL to the source is measured on. tolerance: those whose weight files are larger than the smallest
    by more than this share do not compete. policy: a gate, a file or a packaged one; the best that passes it wins.
    """

    kind: Literal["search"]
    candidates: dict[StrictStr, list[dict[str, Any]]] = Field(min_length=2)
    recover: list[dict[str, Any]] = Field(default_factory=list)
    data: StrictStr = Field(default="tales_heldout", min_length=1)
    tokens: StrictInt = Field(default=16_384, ge=1)
    tolerance: float = Field(default=0.02, ge=0.0, le=1.0)
    policy: StrictStr | None = Field(default=None, min_length=1)


@dataclass(frozen=True, slots=True)
class Search:
    """A recipe that searches. candidates: the recipe of each, by name, recovered; rest: what follows the winner."""

    stage: SearchStage
    candidates: dict[str, Recipe]
    rest: list[Any]
    model: str | None

    def won(self, name: str) -> Recipe:
        """The recipe of the whole run if this candidate wins."""
        whole = self.candidates[name]
        following = parse_recipe({"stages": [*_plain(whole), *self.rest]}, "the recipe behind its search")
        return following.model_copy(update={"model": self.model, "seed": whole.seed})


def load_search(
    path: str | Path, overrides: Sequence[str] = (), *, model: str | None = None, seed: int | None = None
) -> Search | None:
    """Reads a recipe that begins with a search, a file or a shipped one; None for any other recipe.

    Raises:
        UserError: as `load_recipe`; a search that does not come first, or that nothing follows; a candidate that
            quantises, which no stage could follow.
    """
    data = read_yaml(find_recipe(path))
    for override in overrides:
        apply_override(data, override)
    stages = data.get("stages")
    if not isinstance(stages, list) or not any(_searches(stage) for stage in stages):
        return None
    if not _searches(stages[0]) or any(_searches(stage) for stage in stages[1:]):
        raise UserError(f"recipe {path}: a search is the first stage, and there is one", "move it to the front")
    if len(stages) == 1:
        raise UserError(f"recipe {path}: nothing follows the search", "let a stage follow, such as `kind: quantize`")
    given = {"model": model, "seed": seed}
    shared = {key: value for key, value in data.items() if key != "stages"}
    shared |= {key: value for key, value in given.items() if value is not None}
    try:
        stage = SearchStage.model_validate(stages[0])
    except ValidationError as error:
        problems = "; ".join(f"stages.0.{problem}" for problem in describe(error, SearchStage))
        raise UserError(f"recipe {path}: {problems}", HINT) from None
    candidates = {
        name: parse_recipe({**shared, "stages": [*own, *stage.recover]}, f"candidate {name} of recipe {path}")
        for name, own in stage.candidates.items()
    }
    for name, candidate in candidates.items():
        _refuse(name, candidate)
    found = Search(stage, candidates, stages[1:], shared.get("model"))
    found.won(next(iter(candidates)))
    return found


def _searches(stage: object) -> bool:
    return isinstance(stage, Mapping) and stage.get("kind") == "search"


def _refuse(name: str, candidate: Recipe) -> None:
    if name in ("", ".", "..") or Path(name).name != name:
        raise UserError(f"candidate {name!r} names a directory: its name is no file name", "use letters and digits")
    if candidate.checks:
        raise UserError(f"candidate {name} has a gate or an eval of its own", "give the search a `policy`")
    if any(isinstance(stage, QuantizeStage) for stage in candidate.stages):
        raise UserError(f"candidate {name} quantises", "quantise behind the search, which then holds for the winner")


def _plain(recipe: Recipe) -> list[Any]:
    return list(recipe.model_dump(mode="json")["stages"])

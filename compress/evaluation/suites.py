"""Suites: what to score a model on, as TOML. `smoke`, `pr`, `nightly` and `release` ship; a path names one's own.

A suite lists texts (perplexity, KL), tasks (right or wrong item by item) and prompts (greedy answers compared with the
baseline's). Unknown keys are refused, so that a typing error never makes a suite score less. Free of torch.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compress import content
from compress.artifact.canonical import sha256_bytes, sha256_json
from compress.errors import UserError
from compress.recipe_problems import describe, nearest

SEED = 1234
"""Seed of the order in which items are chosen where nothing else is said; the shipped items follow it."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SuiteText(_Section):
    """A text to score. `name`: a packaged text, one of the data directory's (`wikitext-2`), or a file's path.

    `max_tokens` scored tokens at most, spread over the text; `seq_len` tokens per window. None: the defaults of `cut`.
    """

    name: str = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    seq_len: int | None = Field(default=None, ge=2)


class SuiteTask(_Section):
    """A task to score. `name`: a packaged task, or the path of a JSONL or lm-eval YAML file.

    `items`: how many, chosen by `seed` in proportion to the task's strata; all of them if None. A larger choice holds
    every smaller one of the same seed.
    """

    name: str = Field(min_length=1)
    items: int | None = Field(default=None, ge=1)
    seed: int = Field(default=SEED, ge=0)


class SuiteGeneration(_Section):
    """Prompts to answer greedily, `max_tokens` tokens each."""

    prompts: tuple[str, ...] = Field(min_length=1)
    max_tokens: int = Field(default=48, ge=1)


class Suite(_Section):
    """What a record was scored on. `cost`: whether to measure speed and memory too."""

    version: Literal[1] = 1
    name: str = Field(min_length=1)
    texts: list[SuiteText] = []
    tasks: list[SuiteTask] = []
    generation: SuiteGeneration | None = None
    cost: bool = False

    @model_validator(mode="after")
    def _scores_something_once(self) -> Suite:
        if not (self.texts or self.tasks or self.generation or self.cost):
            raise ValueError("the suite scores nothing")
        for what, names in (("text", [t.name for t in self.texts]), ("task", [t.name for t in self.tasks])):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"the {what} `{twice[0]}` occurs twice")
        return self

    def sha256(self) -> str:
        """Hash of what the suite says: order counts, comments and spelling do not.

        A file of the user's own counts by its content, not by its path.
        """
        value = self.model_dump(mode="json")
        for entry in (*value["texts"], *value["tasks"]):
            file = Path(entry["name"])
            if file.is_file():
                entry["name"] = f"{file.name}:{sha256_bytes(file.read_bytes())}"
        return sha256_json(value)


def packaged_suites() -> dict[str, Path]:
    """The suites that ship with the package, by name."""
    directory = content.eval_dir() / "suites"
    return {path.stem: path for path in sorted(directory.glob("*.toml"))}


def load_suite(name_or_path: str | Path) -> Suite:
    """Reads a packaged suite by name, or a suite file. Relative files in it are looked for beside it.

    Raises UserError for a missing file, bad TOML, an unknown key, or a value out of range.
    """
    packaged = packaged_suites()
    hint = f"packaged: {', '.join(packaged)}; see eval/suites for commented examples"
    shipped = packaged.get(str(name_or_path))
    path = shipped or Path(name_or_path)
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        word = str(name_or_path)
        meant = nearest(word, list(packaged)) if Path(word).name == word and not path.suffix else ""
        raise UserError(f"there is no suite {word!r}{meant or f': {error.strerror}'}", hint) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"the suite {name_or_path} is not TOML: {error}", hint) from error
    values.setdefault("name", path.stem)
    values["texts"] = [_beside(entry, path, shipped is not None) for entry in values.pop("text", [])]
    values["tasks"] = [_beside(entry, path, shipped is not None) for entry in values.pop("task", [])]
    if isinstance(generation := values.get("generation"), dict) and isinstance(generation.get("prompts"), int):
        values["generation"] = {**generation, "prompts": packaged_prompts(generation["prompts"])}
    try:
        return Suite.model_validate(values)
    except ValidationError as error:
        raise UserError(f"suite {name_or_path}: {'; '.join(describe(error, Suite))}", hint) from None


def packaged_prompts(count: int) -> tuple[str, ...]:
    """The first `count` of the shipped prompts, beginnings of held-out sentences. Raises UserError where there are
    fewer."""
    lines = (content.eval_dir() / "data" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    if not 1 <= count <= len(lines):
        raise UserError(f"a suite asks for {count} prompts; {len(lines)} ship", f"ask for 1 to {len(lines)}")
    return tuple(json.loads(line)["prompt"] for line in lines[:count])


def task_of(spec: str) -> SuiteTask:
    """The task that `--tasks` names: `blimp`, `blimp:500` (500 of its items), or a file's path."""
    name, _, count = spec.rpartition(":")
    if name and count.isdecimal() and int(count) > 0:
        return SuiteTask(name=name, items=int(count))
    if not spec:
        raise UserError("a task's name is empty", "give names or paths, separated by commas")
    return SuiteTask(name=spec)


def _beside(entry: Any, suite: Path, shipped: bool) -> Any:
    """The entry with a relative file that lies beside the suite made a path; anything else as it is."""
    if shipped or not isinstance(entry, dict) or not isinstance(name := entry.get("name"), str):
        return entry
    file = suite.parent / name
    return {**entry, "name": str(file)} if file.is_file() else entry

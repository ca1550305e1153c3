"""A distillation recipe from single settings: what the flags of `compress distill` and `compress.distill` mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import UserError
from compress.recipe import Recipe, parse_recipe
from compress.recipe_build import only_stage
from compress.recipe_yaml import find_recipe, read_yaml

CACHED_K = 10
"""Top tokens that a cache keeps where nothing else is said: 40 bytes per token, 60 with ids of 32 bits."""
FLAGS_HINT = "`compress methods` lists losses and their settings; `compress distill --help` the options"


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillSettings:
    """Settings of one distillation, each None where not given."""

    teacher: str | None = None
    student: str | None = None
    loss: str | None = None
    temperature: float | None = None
    minutes: float | None = None
    steps: int | None = None
    lora_rank: int | None = None
    full: bool = False
    learning_rate: float | None = None
    batch_size: int | None = None
    cache: str | None = None
    data: str | None = None
    samples: int | None = None
    seq_len: int | None = None
    answers: int | None = None
    seed: int | None = None


def build_distill_recipe(settings: DistillSettings, *, base: str | Path | None = None) -> Recipe:
    """The recipe of `settings` over the recipe `base` (a file or a shipped name).

    Raises:
        UserError: both a time and a number of steps, both a rank and all weights, a base that does not distill or has
            several stages, or a result that is no valid recipe.
    """
    if settings.minutes is not None and settings.steps is not None:
        raise UserError(
            f"minutes {settings.minutes:g} and steps {settings.steps} were both given", "give one of the two"
        )
    if settings.full and settings.lora_rank is not None:
        raise UserError(f"LoRA rank {settings.lora_rank} and full were both given", "give one of the two")
    data: dict[str, Any] = {"version": 1, "stages": [{"kind": "distill"}]}
    if base is not None:
        data = read_yaml(find_recipe(base))
    stage = only_stage(data, base)
    if stage.get("kind") != "distill":
        raise UserError(f"recipe {base} does not distill", "use `compress run` with it")
    for key, value in (("model", settings.student), ("seed", settings.seed)):
        if value is not None:
            data[key] = value
    _set_loss(stage, settings)
    given = {
        "teacher": settings.teacher,
        "lora_rank": 0 if settings.full else settings.lora_rank,
        "learning_rate": settings.learning_rate,
        "batch_size": settings.batch_size,
        "cache": settings.cache,
    }
    stage |= {key: value for key, value in given.items() if value is not None}
    time = {key: value for key in ("minutes", "steps") if (value := getattr(settings, key)) is not None}
    if time:
        stage.pop("minutes", None)
        stage.pop("steps", None)
        stage |= time
    text: dict[str, Any] = {"source": settings.data, "samples": settings.samples, "seq_len": settings.seq_len}
    if settings.answers is not None:
        known = (stage.get("calibration") or {}).get("answers")
        text["answers"] = {**(known if isinstance(known, dict) else {}), "max_tokens": settings.answers}
    if text := {key: value for key, value in text.items() if value is not None}:
        stage["calibration"] = {**(stage.get("calibration") or {}), **text}
    if base is None:
        return parse_recipe(data, "the request", root="stages.0.", hint=FLAGS_HINT)
    return parse_recipe(data, f"recipe {base}")


def _set_loss(stage: dict[str, Any], settings: DistillSettings) -> None:
    cached = settings.cache is not None and settings.loss in (None, "topk-kl")
    method = stage.get("method") or ({"kind": "topk-kl", "k": CACHED_K} if cached else "forward-kl")
    method = {"kind": method} if isinstance(method, str) else dict(method)
    if settings.loss is not None and settings.loss != method.get("kind"):
        method = {"kind": settings.loss}
    if settings.temperature is not None:
        method["temperature"] = settings.temperature
    stage["method"] = method

"""training.json: how a student learned, as an artifact carries it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue

TRAINING_NAME = "training.json"


class HeldOut(BaseModel):
    """KL(teacher || student) per token in nats, on the windows held out, after so many steps."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    kl: float


class TrainingRecord(BaseModel):
    """One training.

    `losses` holds every step's mean loss per token, `held_out` the KL that decides which weights are kept: those of
    `best_step`. `written_kl` is that of the weights as the artifact holds them, merged and rounded. `steps` were
    planned, `done` were made. `zeros` counts the weights that were zero and are. `stage` numbers the stage in a recipe.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    teacher: str
    loss: dict[str, JsonValue]
    trained: str
    parameters: int
    learning_rate: float
    steps: int
    done: int
    best_step: int
    tokens_per_step: int
    held_out_tokens: int
    stopped_early: bool
    written_kl: float
    zeros: int
    held_out: list[HeldOut] = Field(min_length=1)
    losses: list[float]

    @property
    def start_kl(self) -> float:
        """Before the first step."""
        return self.held_out[0].kl

    def to_bytes(self) -> bytes:
        """The file."""
        return (json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False) + "\n").encode()


def curve_rows(record: Mapping[str, Any], most: int = 11) -> list[tuple[int, float, float | None]]:
    """(step, held-out KL, mean loss since the row before) of at most so many points, the first and the last among them.

    record: the content of training.json.
    """
    points: Sequence[Mapping[str, Any]] = record["held_out"]
    count = min(most, len(points))
    chosen = sorted({round(i * (len(points) - 1) / max(1, count - 1)) for i in range(count)})
    rows, since = [], 0
    for i in chosen:
        step = int(points[i]["step"])
        between = record["losses"][since:step]
        rows.append((step, float(points[i]["kl"]), sum(between) / len(between) if between else None))
        since = step
    return rows

"""cut.json: what a cut lost before repair, after it, and after training, as all that is made of it carries on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from compress.artifact.training import TrainingRecord

CUT_NAME = "cut.json"


class Taught(BaseModel):
    """KL(teacher || student) per token in nats over `tokens` held-out tokens, before the first step and as written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int
    before_kl: float
    after_kl: float


class CutRecord(BaseModel):
    """KL(model before || model behind the cut) per token in nats, over `tokens` tokens of the calibration text `text`.

    plain_kl: of the same cut without repair, which is not written anywhere; repaired_kl: as the artifact of the cut has
    it. taught: of the last distillation behind the cut, None before one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    text: str
    tokens: int
    plain_kl: float
    repaired_kl: float
    taught: Taught | None = None

    def to_bytes(self) -> bytes:
        """The file."""
        return (json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False) + "\n").encode()


def taught(cut: bytes, training: TrainingRecord) -> bytes:
    """The file `cut` after a distillation."""
    now = Taught(tokens=training.held_out_tokens, before_kl=training.held_out[0].kl, after_kl=training.written_kl)
    return CutRecord.model_validate_json(cut).model_copy(update={"taught": now}).to_bytes()


def stages(cut: Mapping[str, Any] | None) -> list[tuple[str, float, str]]:
    """(what was done so far, KL, on what), from the content of cut.json; empty without a cut."""
    if cut is None:
        return []
    text = f"{cut['tokens']} tokens of the calibration text"
    rows = [("after the cut", float(cut["plain_kl"]), text), ("after repair", float(cut["repaired_kl"]), text)]
    if (learned := cut.get("taught")) is not None:
        held_out = f"{learned['tokens']} tokens held out of the training text"
        rows.append(("before training", float(learned["before_kl"]), held_out))
        rows.append(("after training", float(learned["after_kl"]), held_out))
    return rows

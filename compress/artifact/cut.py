"""cut.json: what a cut lost before repair and after it, as its artifact and all that are made from it carry it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

CUT_NAME = "cut.json"


class CutRecord(BaseModel):
    """KL(model before || model behind the cut) per token in nats, over `tokens` tokens of the calibration text `text`.

    plain_kl: of the same cut without repair, which is not written anywhere; repaired_kl: as the artifact has it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    text: str
    tokens: int
    plain_kl: float
    repaired_kl: float

    def to_bytes(self) -> bytes:
        """The file."""
        return (json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False) + "\n").encode()


def stages(cut: Mapping[str, Any] | None, training: Mapping[str, Any] | None) -> list[tuple[str, float, str]]:
    """(what was done so far, KL, on what), from the content of cut.json and training.json; empty without a cut."""
    if cut is None:
        return []
    text = f"{cut['tokens']} tokens of the calibration text"
    rows = [("after the cut", float(cut["plain_kl"]), text), ("after repair", float(cut["repaired_kl"]), text)]
    if training is not None:
        held_out = f"{training['held_out_tokens']} tokens held out of the training text"
        rows.append(("before training", float(training["held_out"][0]["kl"]), held_out))
        rows.append(("after training", float(training["written_kl"]), held_out))
    return rows

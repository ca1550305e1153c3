"""layers.json: for every linear, what was done to it and where the error went."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue


class LayerRecord(BaseModel):
    """One linear; `block` is None for the embedding and the head.

    `scheme` is None where it was left as it was, and `reason` says why. `output_error` is ||Y - Y'||^2 / ||Y||^2 over
    the calibration tokens, `weight_sqnr_db` is 10 log10(||W||^2 / ||W - W'||^2); None where not measured (or, for
    the second, where the weight is unchanged). `fallback` says what was done other than asked. `details` is the
    method's own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    block: int | None
    method: str | None = None
    scheme: str | None = None
    bits_per_weight: float | None = None
    output_error: float | None = None
    weight_sqnr_db: float | None = None
    fallback: str | None = None
    reason: str | None = None
    details: dict[str, JsonValue] = Field(default_factory=dict)


def layers_json(layers: Sequence[LayerRecord]) -> bytes:
    """The file's bytes: a JSON list, one line per linear. Raises ValueError for NaN and infinities."""
    rows: list[dict[str, Any]] = [layer.model_dump(mode="json") for layer in layers]
    lines = ",\n".join(json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    return f"[\n{lines}\n]\n".encode() if rows else b"[]\n"

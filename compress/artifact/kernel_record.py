"""kernels.json: how far the kernels that multiply an artifact's weights are from their definition, as it carries it."""

from __future__ import annotations

import json

from pydantic import BaseModel, ConfigDict

KERNELS_NAME = "kernels.json"


class ProductRecord(BaseModel):
    """One stored linear of a scheme against float64 on its decoded weights, as a share of the largest output.

    error: with inputs as the scheme has them; eight_bit_error: with inputs rounded to 8 bits, None where the scheme
    rounds them itself or its weights are no integers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scheme: str
    linear: str
    linears: int
    error: float
    eight_bit_error: float | None


class KernelRecord(BaseModel):
    """On which back end the artifact runs on a CPU and why, the kernels' instruction set, and a product per scheme."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: str
    reason: str
    isa: str | None
    products: list[ProductRecord]

    def to_bytes(self) -> bytes:
        """The file."""
        return (json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False) + "\n").encode()

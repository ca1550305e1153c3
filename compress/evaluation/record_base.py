"""What every record is made of: the strict pydantic base, the number types, and an interval. Free of torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from compress.evaluation.statistics import Interval

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
Flag = Annotated[int, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    """Frozen, no unknown fields, no conversion of types, no NaN and no infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class IntervalRecord(_Record):
    """An estimate with its two-sided confidence interval at `level`."""

    estimate: float
    low: float
    high: float
    level: float

    @classmethod
    def of(cls, value: Interval) -> IntervalRecord:
        """The record of an interval that the statistics gave."""
        return cls(estimate=value.estimate, low=value.low, high=value.high, level=value.level)

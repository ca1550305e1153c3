"""The stage that prunes: a method, and how much of the model it takes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, StrictStr, field_validator, model_validator

from compress.pruning.configs import PruningConfig, keeps_statistics
from compress.quantization.configs import short_form
from compress.recipe_sections import CalibrationConfig, Section
from compress.stages.shared import with_calibration
from compress.types import Sparsity


class PruneStage(Section):
    """One pass of one pruning method.

    `sparsity`, a share of each linear's weights, or a `pattern` such as 2:4; of a structured method `keep`, the share
    of all parameters that stays. `allocation` shares a sparsity out among the blocks, by their outliers (owl) or their
    spectra (alphapruning), in place of evenly. `format` sparse-bitmask stores one bit for each weight, and those that
    stay: smaller on disk, for our own reader. `stats` is a directory where what a cut measures of the whole model is
    kept for other amounts.
    """

    kind: Literal["prune"] = "prune"
    method: Annotated[PruningConfig, BeforeValidator(short_form)]
    sparsity: float | None = Field(default=None, gt=0.0, lt=1.0)
    pattern: StrictStr | None = None
    keep: float | None = Field(default=None, gt=0.0, lt=1.0)
    allocation: Literal["uniform", "owl", "alphapruning"] = "uniform"
    format: Literal["dense", "sparse-bitmask"] = "dense"
    ignore: list[StrictStr] = Field(default_factory=list)
    stats: StrictStr | None = Field(default=None, min_length=1)
    calibration: CalibrationConfig | None = None

    @field_validator("pattern")
    @classmethod
    def _pattern(cls, value: str | None) -> str | None:
        if value is not None:
            Sparsity.parse(value)
        return value

    @model_validator(mode="after")
    def _one_amount(self) -> PruneStage:
        if self.method.structured:
            if self.keep is None or self.sparsity is not None or self.pattern is not None:
                raise ValueError(f"{self.method.kind} needs `keep`, such as 0.75, and no other amount")
            if self.ignore:
                raise ValueError(f"{self.method.kind} cuts all blocks alike: remove `ignore`")
        elif self.keep is not None:
            raise ValueError(f"{self.method.kind} removes single weights: give `sparsity` or `pattern`, not `keep`")
        elif (self.sparsity is None) == (self.pattern is None):
            raise ValueError("needs either `sparsity`, such as 0.5, or `pattern`, such as 2:4")
        return self

    @model_validator(mode="after")
    def _zeros_are_packed(self) -> PruneStage:
        if self.method.structured and self.format != "dense":
            raise ValueError(f"{self.method.kind} leaves no zeros that {self.format} could pack")
        return self

    @model_validator(mode="after")
    def _statistics_are_of_the_whole_model(self) -> PruneStage:
        if self.stats is not None and self.allocation == "owl":
            raise ValueError("stats: owl measures outliers of its own and keeps none: leave one of the two out")
        if self.stats is not None and not keeps_statistics(self.method):
            raise ValueError(
                f"stats: {self.method.kind} with these settings measures block by block as it goes, and keeps nothing"
            )
        return self

    @model_validator(mode="after")
    def _allocation_shares_a_sparsity(self) -> PruneStage:
        if self.allocation != "uniform" and self.sparsity is None:
            raise ValueError(f"allocation {self.allocation} shares out a `sparsity`: a pattern or a cut is uniform")
        return self

    @model_validator(mode="after")
    def _calibration_goes_with_method(self) -> PruneStage:
        return with_calibration(self, self.method.calibrated or self.allocation == "owl")

    def to_sparsity(self) -> Sparsity:
        """The amount as the rest of the library passes it around."""
        if self.pattern is not None:
            return Sparsity.parse(self.pattern)
        assert self.sparsity is not None
        return Sparsity(self.sparsity)

"""What more than one kind of stage asks of its settings."""

from __future__ import annotations

from typing import Protocol, TypeVar

from compress.recipe_sections import CalibrationConfig

ALL_TOKENS = ("gptq", "awq")
"""Methods that can have experts learn from all tokens."""
CHOOSING = ("autoround",)
"""Methods that hold windows out, whose copies they would learn from."""


class Named(Protocol):
    """What has a `kind`."""

    @property
    def kind(self) -> str: ...


class Calibrated(Named, Protocol):
    """A stage that may read text."""

    @property
    def method(self) -> Named: ...

    @property
    def calibration(self) -> CalibrationConfig | None: ...


_Stage = TypeVar("_Stage", bound=Calibrated)


def switch(value: object) -> object:
    """`refine: true` is `refine: {}`, and `refine: false` is none."""
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


def with_calibration(stage: _Stage, wanted: bool) -> _Stage:
    """Fills in the default text where one is `wanted` to learn from. ValueError for one that is not read."""
    if wanted and stage.calibration is None:
        object.__setattr__(stage, "calibration", CalibrationConfig())
    if not wanted and stage.calibration is not None:
        raise ValueError(f"{stage.method.kind} reads no calibration text: remove `calibration`")
    said = stage.calibration or CalibrationConfig()
    if said.experts == "all" and stage.method.kind not in ALL_TOKENS:
        raise ValueError(f"{stage.method.kind} calibrates experts on routed tokens alone: remove `calibration.experts`")
    if said.redrawn and (stage.kind == "prune" or stage.method.kind in CHOOSING):
        raise ValueError(f"{stage.method.kind} reads windows as they are: remove `calibration.redrawn`")
    return stage

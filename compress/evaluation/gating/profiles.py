"""Profiles: other limits for other numeric layouts, because 8 bits may lose less than 4.

`[profile.int8]` with `schemes = ["w8a*"]` and `kl.max = 0.001` sets the limit of the gate `kl` for every candidate
whose scheme fits. A profile changes limits, never which gates there are, what they measure, or their role.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from compress.errors import UserError
from compress.evaluation.gating.kinds import Gate, GateSpec
from compress.recipe_problems import nearest

FIXED = ("id", "kind", "role", "baseline", "text", "task")
_GATE: TypeAdapter[Gate] = TypeAdapter(GateSpec)


class Profile(BaseModel):
    """`schemes` are patterns (`w8a*`); every other key is a gate's id with the values that differ."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    schemes: list[str] = Field(min_length=1)

    @property
    def overrides(self) -> Mapping[str, Any]:
        """Gate id -> changed fields."""
        return self.__pydantic_extra__ or {}

    def fits(self, scheme: str) -> bool:
        """Whether all parts of a scheme (`w4a16-g128+w8a16-channel`) fit one of the patterns."""
        return all(any(fnmatch.fnmatchcase(part, p) for p in self.schemes) for part in scheme.lower().split("+"))

    def apply(self, gates: Sequence[Gate]) -> list[Gate]:
        """The gates with this profile's limits. Raises ValueError for what a profile may not say."""
        known = {gate.id for gate in gates}
        if unknown := [key for key in self.overrides if key not in known]:
            raise ValueError(f"`{unknown[0]}` is neither `schemes` nor the id of a gate ({', '.join(sorted(known))})")
        return [_changed(gate, self.overrides.get(gate.id, {})) for gate in gates]


def _changed(gate: Gate, values: Any) -> Gate:
    if not isinstance(values, Mapping):
        raise ValueError(f"`{gate.id}` must give fields of that gate, as `{gate.id}.max = 0.1` does")
    if fixed := [key for key in values if key in FIXED]:
        raise ValueError(f"`{gate.id}.{fixed[0]}` is not a limit; a profile changes limits only")
    try:
        return _GATE.validate_python({**gate.model_dump(), **values})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(step) for step in first["loc"][1:]) or gate.id
        problem = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            problem = "unknown key" + nearest(field, [name for name in type(gate).model_fields if name not in FIXED])
        raise ValueError(f"`{gate.id}.{field}`: {problem}") from None


def select(profiles: Mapping[str, Profile], scheme: str) -> str | None:
    """The name of the profile for a scheme, None where none fits. Raises UserError where two do."""
    fitting = [name for name, profile in profiles.items() if profile.fits(scheme)]
    if len(fitting) > 1:
        raise UserError(
            f"the profiles {' and '.join(fitting)} of the policy both fit the scheme {scheme!r}",
            "make their `schemes` exclusive",
        )
    return fitting[0] if fitting else None

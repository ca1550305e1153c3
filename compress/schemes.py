"""Names of numeric layouts as the field writes them: `W4A16` is 4-bit weights and 16-bit activations."""

from __future__ import annotations

import re
from dataclasses import dataclass

from compress.errors import UserError

BITS = tuple(range(2, 9))
INTEGER_SCHEMES: tuple[str, ...] = tuple(f"W{bits}A16{suffix}" for bits in BITS for suffix in ("", "_ASYM"))


@dataclass(frozen=True, slots=True)
class NamedScheme:
    """What a scheme name says. `symmetric` is None where the name leaves it open."""

    name: str
    bits: int
    symmetric: bool | None


def parse_scheme(name: str) -> NamedScheme:
    """Reads a scheme name, in any case.

    Raises:
        UserError: the name is not one of `INTEGER_SCHEMES`.
    """
    found = re.fullmatch(r"W([2-8])A16(_ASYM)?", name.strip().upper())
    if found is None:
        raise UserError(
            f"unknown scheme {name!r}",
            f"choose from {', '.join(INTEGER_SCHEMES)}, or give --bits and --group-size",
        )
    return NamedScheme(found.group(0), int(found.group(1)), False if found.group(2) else None)

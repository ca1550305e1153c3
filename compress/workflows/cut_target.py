"""What a cut is to come down to: parameters, bytes of the weight files, or so many times the source's speed.

Free of torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from compress.errors import UserError
from compress.workflows.budget.target import parse_size

_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
SPEEDS = ("decode", "prefill")

Kind = Literal["params", "size", "speedup"]
Speed = Literal["decode", "prefill"]


@dataclass(frozen=True, slots=True)
class CutTarget:
    """`params`: at most so many parameters; `size`: at most so many bytes of weight files; `speedup`: at least so many
    times as fast as the source, by `speed`: decoding one sequence, or reading one prompt."""

    kind: Kind
    value: float
    speed: Speed = "decode"

    @property
    def option(self) -> str:
        """As the command line has it."""
        return f"--target-{self.kind}"


def parse_cut_target(
    params: str | int | None,
    size: str | int | None,
    speedup: float | None,
    *,
    speed: str | None = None,
    keep: float | None = None,
) -> CutTarget | None:
    """The target that the settings name, None for none.

    Raises:
        UserError: more than one, one beside a `keep`, or a value that is none.
    """
    named = {"--target-params": params, "--target-size": size, "--target-speedup": speedup, "--keep": keep}
    given = [name for name, value in named.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} each say how much stays", "give one of them")
    if speed is not None and (speedup is None or speed not in SPEEDS):
        raise UserError(
            f"--speed-of {speed} is for --target-speedup and one of {', '.join(SPEEDS)}",
            "give for example --target-speedup 1.5 --speed-of decode",
        )
    if params is not None:
        return CutTarget("params", _count(str(params)))
    if size is not None:
        return CutTarget("size", parse_size(str(size)))
    if speedup is None:
        return None
    if not 1 < speedup < 1000:
        raise UserError(f"--target-speedup {speedup:g} is no gain", "give for example 1.5: half as fast again")
    return CutTarget("speedup", speedup, "prefill" if speed == "prefill" else "decode")


def _count(text: str) -> int:
    """Parameters of `4M`, `1.5B`, `350k`, `4000000`. Raises UserError for what is no count."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMBT]?)\s*", text.upper())
    if found is None or not float(found.group(1)):
        raise UserError(f"--target-params {text!r} is no count of parameters", "write for example 4M, 1.5B or 4000000")
    return int(float(found.group(1)) * _FACTORS[found.group(2)])

"""What a budget says: bits per weight, bytes of the file, or the KL that must be kept. Free of torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from compress.errors import UserError

_UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**n for n, p in enumerate("kMGT", 1)}, "KB": 1000}
_UNITS |= {f"{p}iB": 1024**n for n, p in enumerate("KMGT", 1)}

AUTO = "auto"
"""What embedding and head are called whose scheme the budget chooses."""
METHOD = "gptq"
"""What rounds within a budget unless said otherwise: the best quality per bit."""

Kind = Literal["bits", "file-bits", "bytes", "kl"]
OPTIONS: dict[Kind, str] = {
    "bits": "--target-bits",
    "file-bits": "--target-file-bits",
    "bytes": "--target-size",
    "kl": "--max-kl",
}


@dataclass(frozen=True, slots=True)
class Target:
    """`bits`: at most so many stored bits per weight of what schemes are chosen for; `file-bits`: of all that the model
    has; `bytes`: of the weight files; `kl`: the fewest bits whose KL, in nats per token, is at most this."""

    kind: Kind
    value: float

    @property
    def option(self) -> str:
        """As the command line has it."""
        return OPTIONS[self.kind]

    @property
    def text(self) -> str:
        """In words."""
        if self.kind == "bytes":
            return f"at most {self.value:.0f} bytes"
        of = {"bits": "bits per weight", "file-bits": "bits per weight of the whole file"}.get(self.kind)
        return f"KL at most {self.value:g}" if of is None else f"at most {self.value:g} {of}"


def parse_target(
    bits: float | None,
    size: str | None,
    max_kl: float | None,
    chosen: Mapping[str, object] | None = None,
    file_bits: float | None = None,
) -> Target | None:
    """The budget that the options name, None for none.

    chosen: what a budget is to choose, by the name of its option; None where not given.

    Raises:
        UserError: more than one, a value that is none, or something that contradicts a budget.
    """
    options = {"--target-bits": bits, "--target-file-bits": file_bits, "--target-size": size, "--max-kl": max_kl}
    given = [name for name, value in options.items() if value is not None]
    said = [f"--{name}" for name, value in (chosen or {}).items() if value is not None]
    if given and said:
        raise UserError(
            f"{given[0]} chooses the bits of every linear, which contradicts {said[0]}",
            "give one of the two; --group-size and --asym limit what is chosen from",
        )
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are two budgets", "give one of them")
    if bits is not None:
        return Target("bits", _positive("--target-bits", bits))
    if file_bits is not None:
        return Target("file-bits", _positive("--target-file-bits", file_bits))
    if max_kl is not None:
        return Target("kl", _positive("--max-kl", max_kl))
    return None if size is None else Target("bytes", float(parse_size(size)))


def chosen_group_sizes(given: int | str | None) -> list[int | None] | None:
    """The group sizes to choose from: the one that is given (None within the list: `channel`), or the usual ones."""
    if given is None:
        return None
    return [None if given == "channel" else int(given)]


def chosen_tables(embeddings: str | None, head: str | None, target: Target | None) -> list[str]:
    """Which of `embeddings` and `head` a budget chooses schemes for: those that are `auto`.

    Raises:
        UserError: `auto` without a budget.
    """
    found = [name for name, given in (("embeddings", embeddings), ("head", head)) if given == AUTO]
    if found and target is None:
        raise UserError(
            f"--{found[0]} {AUTO} is for a budget, which chooses its scheme",
            f"give {', '.join(OPTIONS.values())}, or a scheme",
        )
    return found


def parse_size(text: str) -> int:
    """Bytes of `3.2GiB`, `500MB`, `12000000`. Raises UserError for what is no size."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", text)
    factor = _UNITS.get(found.group(2)) if found else None
    if found is None or factor is None or not float(found.group(1)):
        raise UserError(
            f"--target-size {text!r} is no size", f"write for example 3.2GiB; units are {', '.join(_UNITS)[2:]}"
        )
    return int(float(found.group(1)) * factor)


def _positive(option: str, value: float) -> float:
    if not 0 < value < float("inf"):
        example = 4.25 if "bits" in option else 0.02
        raise UserError(f"{option} {value} is not a positive number", f"give for example {option} {example}")
    return value

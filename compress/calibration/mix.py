"""How a calibration text is named: one source, or a mix `a:0.5,b:0.5`. Free of torch and of files' contents."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from compress import content

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w.\[\]:%-]+)?")
"""A data set of the hub: org/name, its configuration behind another slash, its split behind an @."""

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".safetensors")
_SHARE = re.compile(r"(?P<source>.+):(?P<share>\d+(\.\d*)?|\.\d+)")


@dataclass(frozen=True, slots=True)
class Part:
    """One source of a mix and its share of the windows; the shares of a mix add up to 1."""

    source: str
    share: float


def packaged(source: str) -> Path | None:
    """The file of a packaged text's name; None of anything else."""
    path = content.calibration_dir() / f"{source}.txt"
    return path if Path(source).name == source and path.is_file() else None


def packaged_names() -> list[str]:
    """Names of the texts that ship with the package."""
    return sorted(path.name[:-4] for path in content.calibration_dir().iterdir() if path.name.endswith(".txt"))


def parse_mix(text: str) -> tuple[Part, ...]:
    """The sources that `text` names, with their shares; without numbers they are equal.

    The name of an existing file is that file, whatever characters it has. Shares count in proportion: `a:2,b:1`.

    Raises:
        ValueError: an empty part, one source twice, a share of nothing, or shares for some sources only.
    """
    if _is_file(text):
        return (Part(text, 1.0),)
    pieces = [piece.strip() for piece in text.split(",")]
    if not all(pieces):
        raise ValueError("names an empty source; a mix is written a:0.5,b:0.5")
    found = [(piece, None) if _is_file(piece) else _shared(piece) for piece in pieces]
    sources = [source for source, _ in found]
    if len(set(sources)) < len(sources):
        raise ValueError(f"names {max(sources, key=sources.count)} twice")
    given = [share for _, share in found if share is not None]
    if given and len(given) < len(found):
        raise ValueError("gives a share to some sources only; give it to all or to none")
    if any(share <= 0 for share in given):
        raise ValueError("gives a share of nothing; shares are above 0")
    total = sum(given) or float(len(found))
    return tuple(Part(source, (1.0 if share is None else share) / total) for source, share in found)


def spell(parts: tuple[Part, ...], *, placeless: bool) -> str:
    """The mix as text that `parse_mix` reads; `placeless` names files without directory and suffix."""
    names = [short_name(part.source) if placeless else part.source for part in parts]
    if len(parts) == 1:
        return names[0]
    return ",".join(f"{name}:{part.share:.6g}" for name, part in zip(names, parts, strict=True))


def short_name(source: str) -> str:
    """What messages and records call a source: a file by its stem, a data set of the hub by its whole name."""
    return source if is_hub_name(source) else Path(source).stem


def is_hub_name(source: str) -> bool:
    """Whether a source is meant as a data set of the hub: of its form, and neither a file nor called like one."""
    return HUB_NAME.fullmatch(source) is not None and not source.endswith(SUFFIXES) and not _is_file(source)


def counts(parts: tuple[Part, ...], samples: int) -> list[int]:
    """How many of `samples` windows each part gives: by the largest remainders, the earlier part first."""
    exact = [part.share * samples for part in parts]
    found = [int(value + 1e-9) for value in exact]
    order = sorted(range(len(parts)), key=lambda place: (found[place] - exact[place], place))
    for place in order[: samples - sum(found)]:
        found[place] += 1
    return found


def _is_file(source: str) -> bool:
    try:
        return Path(source).is_file()
    except (OSError, ValueError):  # a name that no file system takes
        return False


def _shared(piece: str) -> tuple[str, float | None]:
    match = _SHARE.fullmatch(piece)
    return (piece, None) if match is None else (match["source"].strip(), float(match["share"]))

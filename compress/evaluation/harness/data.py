"""Evaluation data: where a file lies, and that it is the one that scores are compared on.

Files are looked for under the directory that the environment variable COMPRESS_DATA names (or, where it holds a hub id
such as `org/name`, in that data set on the hub), then under `../shared/data` beside a checkout. Every file's SHA-256 is
known from `eval/data/catalogue.toml`, and a file that differs is refused.
"""

from __future__ import annotations

import os
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from compress import content
from compress.artifact.canonical import sha256_file
from compress.errors import IntegrityError, UserError
from compress.models.hub import HUB_ID

VARIABLE = "COMPRESS_DATA"


class MissingDataError(UserError):
    """A data file that is nowhere."""


@cache
def catalogue() -> dict[str, dict[str, Any]]:
    """`files`: the SHA-256 of each known data file by its path below the data directory; `shipped`: SHA-256 and number
    of items of each file below `eval/data`; `texts`: the files of texts by name."""
    return tomllib.loads((content.eval_dir() / "data" / "catalogue.toml").read_text(encoding="utf-8"))


def find_text(name: str) -> Path | None:
    """The file of one of the catalogue's texts, such as `wikitext-2`; None where it names none.

    Raises:
        UserError, IntegrityError: as `find_data`.
    """
    path = catalogue()["texts"].get(name)
    return None if path is None else find_data(path)


def shipped_items(path: str) -> int:
    """How many items the file of that path below `eval/data` holds; 0 where there is none."""
    return int(catalogue()["shipped"].get(path, {}).get("items", 0))


def shipped_file(path: str) -> Path:
    """The file of that path below `eval/data`, its bytes checked. Raises IntegrityError where it was changed."""
    file = content.eval_dir() / "data" / path
    if not file.is_file():
        raise IntegrityError(f"{file} is missing", "install compress again")
    return _verified(file, catalogue()["shipped"][path]["sha256"], "install compress again")


def find_data(path: str) -> Path:
    """The data file of that path below a data directory, its bytes checked.

    Raises:
        UserError: it is nowhere.
        IntegrityError: it is not the file that the catalogue describes.
    """
    for directory in _directories():
        file = directory / path
        if file.is_file():
            return _checked(file, path)
    repository = os.environ.get(VARIABLE, "")
    if HUB_ID.fullmatch(repository):
        return _checked(_download(repository, path), path)
    looked = ", ".join(str(directory) for directory in _directories()) or "no directory"
    raise MissingDataError(
        f"the evaluation data {path} is not there (looked in {looked})",
        f"set {VARIABLE} to the directory that holds it; the suites smoke and pr need no data besides what ships",
    )


def _directories() -> list[Path]:
    named = os.environ.get(VARIABLE, "")
    places = [Path(named).expanduser()] if named else []
    if named and not places[0].is_dir() and not HUB_ID.fullmatch(named):
        raise UserError(f"{VARIABLE} is {named!r}, which is no directory", "name the directory that holds the data")
    places.append(Path(__file__).resolve().parents[4] / "shared" / "data")
    return [place for place in places if place.is_dir()]


def _checked(file: Path, path: str) -> Path:
    known = catalogue()["files"].get(path)
    if known is None:
        raise IntegrityError(f"no SHA-256 is known of {path}", "name a file of eval/data/catalogue.toml")
    hint = f"restore the file, or point {VARIABLE} at a directory that holds the right one"
    return _verified(file, known, hint)


def _verified(file: Path, wanted: str, hint: str) -> Path:
    found = _digest(file, file.stat().st_mtime_ns, file.stat().st_size)
    if found != wanted:
        raise IntegrityError(
            f"{file} is not the data that scores are compared on: its SHA-256 is {found}, not {wanted}", hint
        )
    return file


@cache
def _digest(file: Path, changed: int, size: int) -> str:
    """A file's SHA-256, computed once for as long as the file stays as it is."""
    return sha256_file(file)


def _download(repository: str, path: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, path, repo_type="dataset"))
    except (EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the evaluation data {path} could not be fetched from {repository}: {first}",
            f"check the network, or set {VARIABLE} to a directory that holds it",
        ) from error

"""Which text to score on: a packaged one by name, or any UTF-8 file by path."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from compress import content
from compress.errors import UserError

DEFAULT = "tales_heldout"


@dataclass(frozen=True, slots=True)
class Text:
    """A text, its name in records, and the SHA-256 of its bytes."""

    name: str
    text: str
    sha256: str


def packaged() -> list[str]:
    """Names of the texts that ship with the package."""
    names = (entry.name for entry in content.eval_dir().joinpath("data").iterdir())
    return sorted(name.removesuffix(".txt") for name in names if name.endswith(".txt"))


def read_text(source: str | Path) -> Text:
    """Reads a packaged text or a file. Raises UserError where there is none, or it is not UTF-8."""
    if str(source) in packaged():
        data = content.eval_dir().joinpath("data", f"{source}.txt").read_bytes()
    else:
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            raise UserError(
                f"evaluation text {str(source)!r} is neither a packaged name nor a readable file: {error.strerror}",
                f"packaged: {', '.join(packaged())}; or give the path of a UTF-8 text file",
            ) from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"evaluation text {source} is not UTF-8 (byte {error.start})", "convert it: iconv -t utf-8"
        ) from error
    return Text(Path(source).name.removesuffix(".txt"), text, hashlib.sha256(data).hexdigest())

"""What a command shows. stdout is for results: plain lines, or one JSON document. Everything else goes to stderr."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

    from compress.commands._progress import QuietProgress
    from compress.progress import Progress


class View:
    """The two output streams of one command, and the rules of `--json` and `--quiet`."""

    def __init__(self, *, json_mode: bool, quiet: bool, stdout: TextIO | None = None) -> None:
        self.json_mode = json_mode
        self.quiet = quiet
        self._stdout = stdout or sys.stdout
        self._shown: QuietProgress | None = None

    def result(self, document: Mapping[str, Any], lines: Iterable[str]) -> None:
        """Writes the command's result: `document` with `--json`, else the plain `lines`. Call it once."""
        if self.json_mode:
            self._stdout.write(json.dumps(plain(document), indent=2, allow_nan=False) + "\n")
        else:
            self._stdout.writelines(line + "\n" for line in lines)
        self._stdout.flush()

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Shows a framed table on stderr. A column whose name starts with `>` is right-aligned."""
        if self.quiet:
            return
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            right = column.startswith(">")
            table.add_column(column.lstrip(">"), justify="right" if right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        self._console().print(table)

    def note(self, text: str) -> None:
        """A remark on stderr, left out with `--quiet`."""
        if not self.quiet:
            self._console().print(text, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A `warning:` line on stderr, shown with `--quiet` too."""
        from rich.text import Text

        self._console().print(Text.assemble(("warning: ", "yellow"), one_line(text)), soft_wrap=True)

    def annotate(self, line: str) -> None:
        """A line for the CI system that reads the log, on stderr as it is; shown with `--quiet` too."""
        sys.stderr.write(line + "\n")

    def progress(self) -> Progress:
        """Where long work reports: bars on a terminal, occasional lines elsewhere, warnings only with `--quiet`."""
        from compress.commands._progress import LineProgress, QuietProgress, TerminalProgress

        console = self._console()
        if self.quiet:
            self._shown = QuietProgress(self.warn)
        elif console.is_terminal:
            self._shown = TerminalProgress(console, self.warn)
        else:
            self._shown = LineProgress(self.note, self.warn)
        return self._shown

    def close(self) -> None:
        """Clears away what is still moving on the screen, so that error lines stand alone."""
        if self._shown is not None:
            self._shown.close()

    def _console(self) -> Console:
        from rich.console import Console

        return Console(file=sys.stderr, width=None if sys.stderr.isatty() else 120)


def plain(value: Any) -> Any:
    """The value as JSON can hold it: paths as text, dataclasses and models as mappings, NaN and inf as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if hasattr(value, "model_dump"):
        return plain(value.model_dump(mode="json"))
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if hasattr(value, "item") and callable(value.item):
        return plain(value.item())
    return str(value)


def facts(pairs: Iterable[tuple[str, object]]) -> list[str]:
    """Aligned `name  value` lines; pairs whose value is None are left out."""
    shown = [(name, value) for name, value in pairs if value is not None]
    width = max((len(name) for name, _ in shown), default=0)
    return [f"{name:<{width}}  {value}" for name, value in shown]


def columns(rows: Sequence[Sequence[object]]) -> list[str]:
    """Rows as lines of aligned columns, for results that are lists."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))] if cells else []
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def size(count: float | None) -> str:
    """Bytes in decimal units, as disks are sold and files listed: 11.5 MB."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.4g} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def duration(seconds: float | None) -> str:
    """Seconds for people: 0.4 s, 12 s, 3 min 20 s, 2 h 5 min."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def number(value: float | None, digits: int = 4) -> str:
    """A number to `digits` significant digits, `-` where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


def one_line(text: str) -> str:
    """The text on one line, control characters shown as escapes, so that no file name can paint the terminal."""
    spaced = text.translate({ord(c): " " for c in "\n\t\r"})
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in spaced)


def numberless(name: str) -> str:
    """A tensor's or module's name with its numbers starred: `model.layers.*.mlp.down_proj`, to show kinds together."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def relative(path: str | os.PathLike[str]) -> str:
    """The path as the user would type it from here: relative where it lies below the working directory."""
    absolute, here = Path(path).absolute(), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)

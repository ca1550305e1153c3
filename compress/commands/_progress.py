"""Progress for people: a bar with the time left on a terminal, a line now and then elsewhere. All of it on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from compress.commands._output import duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

SECONDS_BETWEEN_LINES = 15.0


class QuietProgress:
    """Warnings only."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn

    def begin(self, what: str, total: int) -> None:
        """Not shown."""

    def advance(self, note: str = "") -> None:
        """Not shown."""

    def end(self) -> None:
        """Not shown."""

    def warn(self, message: str) -> None:
        """Passed on."""
        self._warn(message)

    def close(self) -> None:
        """Nothing to clear away."""


class LineProgress(QuietProgress):
    """For logs: one line when a stage ends, and one every quarter minute while it runs."""

    def __init__(
        self, say: Callable[[str], None], warn: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(warn)
        self._say = say
        self._clock = clock
        self._what = ""
        self._total = self._done = 0
        self._started = self._said = 0.0

    def begin(self, what: str, total: int) -> None:
        """Starts the clock of a stage."""
        self._what, self._total, self._done = what, total, 0
        self._started = self._said = self._clock()

    def advance(self, note: str = "") -> None:
        """Counts a step; says so if the last line is old enough."""
        self._done += 1
        now = self._clock()
        if now - self._said < SECONDS_BETWEEN_LINES or self._done >= self._total:
            return
        self._said = now
        left = (now - self._started) / self._done * (self._total - self._done)
        detail = f" ({note})" if note else ""
        self._say(f"{self._what}: {self._done}/{self._total}{detail}, about {duration(left)} left")

    def end(self) -> None:
        """Says how long the stage took."""
        if self._what:
            self._say(f"{self._what}: done in {duration(self._clock() - self._started)}")
        self._what = ""


class TerminalProgress(QuietProgress):
    """For terminals: a bar per stage with the time left; a finished stage leaves one line."""

    def __init__(self, console: Console, warn: Callable[[str], None]) -> None:
        super().__init__(warn)
        self._console = console
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._what = ""
        self._started = 0.0

    def begin(self, what: str, total: int) -> None:
        """Shows a bar."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.close()
        self._what, self._started = what, time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False, style="dim"),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task(what, total=total, note="")
        self._bar.start()

    def advance(self, note: str = "") -> None:
        """Moves the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=1, note=note)

    def end(self) -> None:
        """Replaces the bar by one line."""
        if self._bar is not None:
            self.close()
            took = duration(time.monotonic() - self._started)
            self._console.print(f"{self._what}: done in {took}", markup=False, highlight=False)

    def close(self) -> None:
        """Takes the bar off the screen, finished or not."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

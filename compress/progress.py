"""How long work reports itself: one small protocol, so that the library never prints and never imports a terminal.

The commands pass a rich implementation; everything else passes nothing and gets `NullProgress`.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the stages of a long piece of work. Stages do not nest: `begin`, `advance` ..., `end`, then the next."""

    def begin(self, what: str, total: int) -> None:
        """A stage of `total` equal steps starts; `what` is a short phrase such as `quantising blocks`."""

    def advance(self, note: str = "") -> None:
        """One step is done; `note` says what it was."""

    def end(self) -> None:
        """The stage is over."""

    def warn(self, message: str) -> None:
        """Something the user should know that does not stop the work."""


class NullProgress:
    """Reports nothing."""

    def begin(self, what: str, total: int) -> None:
        """Ignored."""

    def advance(self, note: str = "") -> None:
        """Ignored."""

    def end(self) -> None:
        """Ignored."""

    def warn(self, message: str) -> None:
        """Ignored."""

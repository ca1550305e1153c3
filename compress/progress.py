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


class OfModel:
    """Passes everything on to `inner`, stages with the name of the model that they are about."""

    def __init__(self, inner: Progress, model: str) -> None:
        self._inner, self._model = inner, model

    def begin(self, what: str, total: int) -> None:
        """`what`, and of which model."""
        self._inner.begin(f"{what} of {self._model}", total)

    def advance(self, note: str = "") -> None:
        """Passed on."""
        self._inner.advance(note)

    def end(self) -> None:
        """Passed on."""
        self._inner.end()

    def warn(self, message: str) -> None:
        """Passed on."""
        self._inner.warn(message)

"""Whether `--debug` was given, anywhere on the command line. One flag per process, reset by each run of the app."""

from __future__ import annotations

_wanted = False


def remember(given: bool) -> bool:
    """Option callback: keeps the flag once it was seen."""
    global _wanted
    _wanted = _wanted or given
    return given


def wanted() -> bool:
    """Whether tracebacks are to be shown."""
    return _wanted


def reset() -> None:
    """Forgets the flag."""
    global _wanted
    _wanted = False

"""The closed set of errors a user can meet. Each states what is wrong and what to do next.

`cli.py` turns them into one `error:` line, one `hint:` line and an exit code; nothing else maps them.
"""


class CompressError(Exception):
    """Base class: `message` says what is wrong (with the value), `hint` says what to do about it."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UserError(CompressError):
    """Bad arguments, recipe, policy, model directory, calibration text, or an occupied output. Exit code 2."""


class WorkError(CompressError):
    """The work itself failed: disk full, cannot write, out of memory, NaN in weights or loss. Exit code 4."""


class IntegrityError(CompressError):
    """Truncated or damaged file, hash mismatch, or things that cannot be compared. Exit code 5."""

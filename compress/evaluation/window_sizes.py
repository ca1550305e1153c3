"""How long windows of text are, and how many of them an interval needs. Free of torch."""

from __future__ import annotations

DEFAULT_SEQ_LEN = 512
BLOCK_TOKENS = 2048
MIN_DOCUMENTS = 30
MIN_CLUSTERS = 2


def standard_window(context: int | None) -> int:
    """Tokens of a window where nothing else is said: 512, or the model's context where that is shorter."""
    return min(DEFAULT_SEQ_LEN, context or DEFAULT_SEQ_LEN)


def windows_per_block(length: int) -> int:
    """Windows of so many tokens that make up one block of about 2,048."""
    return max(1, BLOCK_TOKENS // length)


def fewest_windows(length: int) -> int:
    """Windows of so many tokens that give the two blocks which an interval needs at least."""
    return (MIN_CLUSTERS - 1) * windows_per_block(length) + 1


def fewest_tokens(length: int) -> int:
    """Scored tokens of those windows, each full but for the one that begins it."""
    return fewest_windows(length) * (length - 1)

"""What is given to a model: one prompt or several, each a text or token ids."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from numbers import Integral
from typing import Any, cast

from compress.errors import UserError

Prompt = str | Sequence[int]


def several(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts; a single text, or ids in any sequence (a tensor too), is one prompt.

    Raises:
        UserError: neither.
    """
    if isinstance(prompts, str):
        return [prompts]
    try:
        found: list[Any] = list(prompts)
    except TypeError:
        raise _no_prompt(prompts) from None
    if found and all(isinstance(one, Integral) or getattr(one, "ndim", None) == 0 for one in found):
        return [cast(Sequence[int], found)]
    return found


def checked_text(text: str) -> str:
    """The text itself; UserError where it holds what no encoded text can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text holds half of a surrogate pair at character {error.start}", "give text that is valid Unicode"
        ) from None
    return text


def token_ids(prompt: Sequence[int]) -> list[int]:
    """Ids as plain integers; UserError where one is none."""
    try:
        return [operator.index(token) for token in prompt]
    except TypeError:
        raise _no_prompt(prompt) from None


def _no_prompt(given: object) -> UserError:
    return UserError(f"{str(given)[:40]!r} is no prompt", "give a text, or a list of token ids")

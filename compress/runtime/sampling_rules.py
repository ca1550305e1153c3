"""What values the fields of `SamplingParams` may have. Free of torch."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

from compress.errors import UserError

_INT32, _INT64, _TINY = 2**31 - 1, 2**63 - 1, 1e-6
_MOST_ANSWERS = 4096


def check(params: object) -> None:
    """Raises UserError for the first field out of its range."""
    for name, allowed, rule in _RULES:
        value = getattr(params, name)
        if not allowed(value):
            raise UserError(f"{name} is {value!r}; it must be {rule}", f"choose another {name}")


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Integral) and low <= int(value) <= high


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Real) and low <= float(value) <= high


def _is_temperature(value: Any) -> bool:
    return _number(0.0, 0.0)(value) or _number(_TINY, 100.0)(value)


def _are_stops(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(stop, str) and stop for stop in value)


_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("max_tokens", _whole(1, _INT64), "a whole number from 1 to 2^63 - 1"),
    ("temperature", _is_temperature, f"0 (greedy), or between {_TINY:g} and 100"),
    ("top_k", _whole(0, _INT32), f"a whole number from 0 (off) to {_INT32}"),
    ("top_p", _number(_TINY, 1.0), f"between {_TINY:g} and 1 (off)"),
    ("seed", _whole(0, _INT64), "a whole number from 0 to 2^63 - 1"),
    ("stop", _are_stops, "strings that are not empty"),
    ("min_p", _number(0.0, 1.0), "between 0 (off) and 1"),
    ("repetition_penalty", _number(_TINY, 100.0), f"between {_TINY:g} and 100"),
    ("presence_penalty", _number(-100.0, 100.0), "between -100 and 100"),
    ("frequency_penalty", _number(-100.0, 100.0), "between -100 and 100"),
    ("n", _whole(1, _MOST_ANSWERS), f"a whole number from 1 to {_MOST_ANSWERS}"),
    ("logprobs", lambda value: value is None or _whole(0, _INT32)(value), "a whole number, 0 or more"),
    ("priority", _whole(-_INT64, _INT64), "a whole number"),
)

"""Turns pydantic's findings into sentences a person can act on: dotted path, value, rule, nearest valid name."""

from __future__ import annotations

import difflib
import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

_WANTED = {
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "list_type": "a list",
    "string_type": "text",
    "int_type": "an integer",
    "bool_type": "true or false",
}


def describe(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """One sentence per problem, in the order of the document."""
    sentences = []
    for found in error.errors():
        location = found["loc"]
        path, owner = _follow(location, root)
        sentences.append(f"{path or 'the document'}: {_sentence(found, owner)}")
    return sentences


def nearest(word: str, choices: Sequence[str]) -> str:
    """`, did you mean ...?` with the closest choice, or the list of all choices where none is close."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f", did you mean `{close[0]}`?" if close else f" (choose from {', '.join(choices)})"


def _sentence(found: Any, owner: Any) -> str:
    kind, value = found["type"], found.get("input")
    context = found.get("ctx") or {}
    if kind == "extra_forbidden":
        known = list(owner.model_fields) if isinstance(owner, type) and issubclass(owner, BaseModel) else []
        return "unknown key" + (nearest(str(found["loc"][-1]), known) if known else "")
    if kind == "missing":
        return "missing"
    if kind in ("union_tag_invalid", "literal_error"):
        choices = context.get("expected_tags") or context.get("expected") or ""
        names = [name.strip().strip("'\"") for name in str(choices).replace(" or ", ", ").split(",")]
        given = context.get("tag", value)
        return f"{given!r} is not known" + nearest(str(given), names)
    if kind == "union_tag_not_found":
        return f"lacks {context.get('discriminator', 'its kind')}"
    if kind == "value_error":
        reason = str(context.get("error", found["msg"]))
        return reason if isinstance(value, (dict, BaseModel)) else f"{value!r} {reason}"
    if kind == "too_short":
        least = int(context.get("min_length", 1))
        wanted = "one entry" if least == 1 else f"{least} entries"
        return f"must be a list with at least {wanted}; it has {context.get('actual_length')}"
    if kind in _WANTED:
        return f"must be {_WANTED[kind]}, not {_shown(value)}"
    rule = found["msg"].removeprefix("Input ").removeprefix("Value ")
    return f"{_shown(value)} {rule}"


def _shown(value: object) -> str:
    return "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(value)


def _follow(location: tuple[int | str, ...], root: type[BaseModel]) -> tuple[str, Any]:
    """The dotted path without the tags pydantic puts into it, and the model that the last step is a key of."""
    shown: list[str] = []
    current: Any = root
    owner: Any = root
    for step in location:
        current = _plain(current)
        members = [_plain(member) for member in get_args(current)] if _is_union(current) else []
        tagged = [m for m in members if isinstance(m, type) and issubclass(m, BaseModel) and _tag(m) == step]
        if tagged:
            current = tagged[0]
            continue
        models = [m for m in members if isinstance(m, type) and issubclass(m, BaseModel)]
        if models:
            current = models[0]
        shown.append(str(step))
        if isinstance(step, int):
            current = get_args(current)[0] if get_args(current) else Any
            owner = current
        elif isinstance(current, type) and issubclass(current, BaseModel):
            owner = current
            field = current.model_fields.get(step)
            current = field.annotation if field is not None else Any
    return ".".join(shown), owner


def _plain(annotation: Any) -> Any:
    return _plain(get_args(annotation)[0]) if get_origin(annotation) is Annotated else annotation


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _tag(model: type[BaseModel]) -> str | None:
    if isinstance(tag := getattr(model, "tag", None), str):
        return tag
    field = model.model_fields.get("kind")
    if field is None or get_origin(field.annotation) is not Literal:
        return None
    return str(get_args(field.annotation)[0])

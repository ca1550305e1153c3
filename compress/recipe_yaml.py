"""Recipe data as YAML: strict reading (plain data only, no key twice) and `key=value` overrides on top of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from compress import content
from compress.errors import UserError


def find_recipe(name: str | Path) -> Path:
    """The file that `name` means: a path, or the bare name of a shipped recipe such as `awq-w4-g128`.

    Raises:
        UserError: a bare name that no file in the working directory and no shipped recipe has.
    """
    path = Path(name)
    bare = path.name == str(name) and not path.suffix
    return content.recipe_path(str(name)) if bare and not path.exists() else path


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, read without constructing anything but plain data.

    Raises:
        UserError: the file is missing, not readable as UTF-8, not YAML, gives a key twice, or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no recipe at {path}", "give the path of a YAML file; `recipes/` holds examples") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read recipe {path}: {error}", "give the path of a readable UTF-8 YAML file") from None
    try:
        data = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"recipe {path} is not valid YAML: {reason}", "correct the line named above") from None
    if not isinstance(data, dict):
        raise UserError(f"recipe {path} holds {_kind(data)}, not a mapping", "start it with `version: 1` and `stages:`")
    return data


def apply_override(data: dict[str, Any], override: str) -> None:
    """Sets one dotted key in plain recipe data, in place: `stages.0.scheme.bits=3`. Mappings on the way are made.

    Raises:
        UserError: not `key=value`, a value that is not YAML, an index outside its list, or a path through a scalar.
    """
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"--set {override!r} is not key=value", "write it as in `--set stages.0.scheme.bits=3`")
    try:
        value = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, RecursionError):
        raise UserError(
            f"--set {key}: {text!r} is not a YAML value", "write a number, a word, or quote the text"
        ) from None
    place: Any = data
    for depth, part in enumerate(parts[:-1]):
        place = _child(place, part, key, ".".join(parts[:depth]))
    slot = _slot(place, parts[-1], key, ".".join(parts[:-1]))
    place[slot] = value


def _child(place: Any, part: str, key: str, where: str) -> Any:
    """The container one step further down the path, made or widened where the short form left it out."""
    slot = _slot(place, part, key, where)
    if isinstance(place, dict):
        if place.get(slot) is None:
            place[slot] = {}
        elif part == "method" and isinstance(place[slot], str):
            place[slot] = {"kind": place[slot]}
    return place[slot]


def _slot(place: Any, part: str, key: str, where: str) -> str | int:
    """The key or index that `part` means in `place`."""
    where = where or "the recipe"
    if isinstance(place, dict):
        return part
    if not isinstance(place, list):
        raise UserError(f"--set {key}: {where} is {_kind(place)} and has no keys", "shorten the path before the `=`")
    if not part.isdigit() or int(part) >= len(place):
        raise UserError(
            f"--set {key}: {where} has {len(place)} entries, {part!r} is not one of them",
            "count from 0, as in `--set stages.0.scheme.bits=3`",
        )
    return int(part)


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice; plain YAML silently keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _kind(value: object) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", type(None): "nothing", bool: "a boolean"}
    return names.get(type(value), "a number")

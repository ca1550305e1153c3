"""A recipe from single settings: what the command line's flags and the Python API's keyword arguments mean.

A setting that is None was not given; given ones override the base recipe. Contradictions are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from compress.errors import UserError
from compress.quantization.configs import METHODS
from compress.recipe import Recipe, parse_recipe
from compress.recipe_sections import needs_calibration, scheme_settings
from compress.recipe_yaml import apply_override, find_recipe, read_yaml
from compress.schemes import FIXED_SCHEMES, USUAL_METHODS, parse_scheme
from compress.types import Scheme

DEFAULT_METHOD = "awq"
FLAGS_HINT = "`compress methods` lists methods, their settings and schemes; `compress quantize --help` the options"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of one quantisation, each None (or empty) where not given."""

    method: str | None = None
    bits: int | None = None
    group_size: int | str | None = None
    symmetric: bool | None = None
    scheme: str | None = None
    kv_cache: str | None = None
    ignore: Sequence[str] = ()
    embeddings: str | None = None
    head: str | None = None
    refine: bool | None = None
    format: str | None = None
    calib: str | None = None
    samples: int | None = None
    seq_len: int | None = None
    experts: str | None = None
    redrawn: int | None = None
    seed: int | None = None
    model: str | None = None

    def for_stage(self) -> bool:
        """Whether anything given belongs to a stage (rather than to the whole recipe)."""
        given = (self.method, self.bits, self.group_size, self.symmetric, self.scheme, self.calib, self.samples)
        others = (self.seq_len, self.refine, self.kv_cache, self.format, self.embeddings, self.head, self.experts)
        return any(value is not None for value in (*given, *others, self.redrawn)) or bool(self.ignore)


def build_recipe(
    settings: Settings, *, base: str | Path | None = None, overrides: Sequence[str] = ()
) -> tuple[Recipe, list[str]]:
    """The recipe of `settings` over the recipe `base` (a file or a shipped name) with `key=value` overrides.

    Returns:
        The recipe, and notes on settings that have no effect with the chosen method.

    Raises:
        UserError: settings contradict each other, a base of several stages meets stage settings, or the result is not
            a valid recipe.
    """
    data: dict[str, Any] = (
        {"version": 1, "stages": [{"kind": "quantize"}]} if base is None else read_yaml(find_recipe(base))
    )
    for override in overrides:
        apply_override(data, override)
    if settings.model is not None:
        data["model"] = settings.model
    if settings.seed is not None:
        data["seed"] = settings.seed
    notes: list[str] = []
    if base is None or settings.for_stage():
        notes = _set_stage(only_stage(data, base), settings)
    if base is None:
        return parse_recipe(data, "the request", root="stages.0.", hint=FLAGS_HINT), notes
    return parse_recipe(data, f"recipe {base}"), notes


def only_stage(data: dict[str, Any], base: str | Path | None) -> dict[str, Any]:
    stages = data.get("stages")
    if isinstance(stages, list) and len(stages) == 1 and isinstance(stages[0], dict):
        return stages[0]
    raise UserError(
        f"recipe {base} has no single stage that method, scheme and calibration settings could belong to",
        "name the stage: `compress run RECIPE --set stages.0.scheme.bits=3`",
    )


def _set_stage(stage: dict[str, Any], settings: Settings) -> list[str]:
    """Writes the given settings into plain stage data, in place; returns notes."""
    _set_scheme(stage, settings)
    if settings.kv_cache is not None:
        stage["kv_cache"] = settings.kv_cache
    usual = "ternary" if settings.format == "bitnet" else _default_method(_fixed(stage["scheme"]))
    set_method(stage, settings.method, usual)
    add_ignored(stage, settings.ignore)
    for table, given in (("embeddings", settings.embeddings), ("head", settings.head)):
        if given is not None:
            stage[table] = None if given in ("none", "auto") else given  # auto: a budget fills it in
    if settings.refine is not None:
        stage["refine"] = (stage.get("refine") or {}) if settings.refine else None
    if settings.format is not None:
        stage["format"] = settings.format
    before = stage.get("calibration") or {}
    if settings.experts is not None and isinstance(before, dict):
        before = stage["calibration"] = {**before, "experts": settings.experts}
    if settings.redrawn is not None and isinstance(before, dict):
        stage["calibration"] = {**before, "redrawn": settings.redrawn}
    return set_calibration(stage, settings, METHODS)


def add_ignored(stage: dict[str, Any], ignore: Sequence[str]) -> None:
    """Adds linears to those that plain stage data leaves alone, in place."""
    if ignore:
        before = stage.get("ignore") or []
        stage["ignore"] = [*before, *(name for name in ignore if name not in before)]


def set_method(stage: dict[str, Any], method: str | None, default: str) -> None:
    """Writes the method into plain stage data, in place; `default` where neither gives one."""
    now = stage.get("method")
    kind = now.get("kind") if isinstance(now, dict) else now
    if method is not None and method != kind:
        stage["method"] = {"kind": method}
    elif now is None:
        stage["method"] = {"kind": default}


def _default_method(fixed: Scheme | None) -> str:
    """What is meant by a scheme without a method."""
    if fixed is None:
        return DEFAULT_METHOD
    return USUAL_METHODS.get(fixed.name, "rtn")


def _set_scheme(stage: dict[str, Any], settings: Settings) -> None:
    bits, symmetric, group_size = settings.bits, settings.symmetric, settings.group_size
    scheme = _spelled_out(stage.get("scheme") or {})
    if not isinstance(scheme, dict):  # reported with the recipe's other problems
        stage["scheme"] = scheme
        return
    named = None if settings.scheme is None else parse_scheme(settings.scheme)
    if named is not None:
        if bits is not None and bits != named.bits:
            raise UserError(
                f"scheme {named.name} has {named.bits} bits, which contradicts bits {bits}", "give one of the two"
            )
        if symmetric is not None and named.symmetric is not None and symmetric != named.symmetric:
            said = ("symmetric", "asym") if named.symmetric else ("asymmetric", "sym")
            raise UserError(f"scheme {named.name} is {said[0]}, which contradicts {said[1]}", "give one of the two")
        if named.fixed is not None and group_size is not None:
            raise UserError(
                f"scheme {named.name} says itself what shares a scale, which contradicts group size {group_size}",
                "give one of the two",
            )
        if named.group_size is not None and group_size not in (None, named.group_size):
            raise UserError(
                f"scheme {named.name} has groups of {named.group_size}, which contradicts group size {group_size}",
                "give one of the two",
            )
    given = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    given = {key: value for key, value in given.items() if value is not None}
    if named is not None and named.fixed is not None:
        stage["scheme"] = scheme_settings(named)
    elif "name" in scheme and not given and named is None:
        stage["scheme"] = scheme
    else:
        kept = {key: value for key, value in scheme.items() if key != "name"}
        stage["scheme"] = {**kept, **({} if named is None else scheme_settings(named)), **given}


def _spelled_out(scheme: object) -> object:
    """A scheme given by name as the settings that the name stands for; what is no scheme stays as it is."""
    if not isinstance(scheme, str):
        return scheme
    try:
        return scheme_settings(parse_scheme(scheme))
    except UserError:  # reported with the recipe's other problems
        return scheme


class CalibrationSettings(Protocol):
    """What settings of every kind say of the calibration text."""

    @property
    def method(self) -> str | None: ...

    @property
    def calib(self) -> str | None: ...

    @property
    def samples(self) -> int | None: ...

    @property
    def seq_len(self) -> int | None: ...


class Method(Protocol):
    """What is read of a method's settings class."""

    calibrated: ClassVar[bool]


def set_calibration(
    stage: dict[str, Any], settings: CalibrationSettings, methods: Mapping[str, type[Method]]
) -> list[str]:
    """Writes the calibration settings into plain stage data, in place; returns notes on those without effect."""
    given = {"source": settings.calib, "samples": settings.samples, "seq_len": settings.seq_len}
    given = {key: value for key, value in given.items() if value is not None}
    now = stage["method"]
    config = methods.get(str(now.get("kind") if isinstance(now, dict) else now))
    reads_text = stage.get("refine") not in (None, False) or stage.get("allocation") == "owl"
    reads_text |= stage.get("kv_cache") is not None
    if config is not None and not config.calibrated and not _static(stage.get("scheme")) and not reads_text:
        dropped = stage.pop("calibration", None) if settings.method is not None else None
        name = str(now.get("kind") if isinstance(now, dict) else now)
        return [f"{name} reads no calibration text: those settings have no effect"] if given or dropped else []
    before = stage.get("calibration") or {}
    if given and isinstance(before, dict):
        stage["calibration"] = {**before, **given}
    return []


def _static(scheme: object) -> bool:
    """Whether plain scheme data asks for something that is calibrated."""
    fixed = _fixed(scheme)
    return fixed is not None and needs_calibration(fixed)


def _fixed(scheme: object) -> Scheme | None:
    """The layout that plain scheme data names in full; None for others."""
    name = scheme.get("name") if isinstance(scheme, dict) else None
    return FIXED_SCHEMES.get(str(name))

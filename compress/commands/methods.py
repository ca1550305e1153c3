"""`compress methods`: what can be asked for."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from compress.commands._command import command
from compress.commands._options import LOOK, Common
from compress.commands._output import View, columns
from compress.distillation.configs import LOSSES
from compress.pruning.configs import PRUNING
from compress.quantization.configs import METHODS, RefineConfig
from compress.schemes import BITS, FIXED_SCHEMES, INTEGER_SCHEMES, MEANINGS


@command("methods", Common, panel=LOOK)
def methods(options: Common, view: View) -> None:
    """List the methods with their settings, and the schemes.

    Examples:

      $ compress methods
      $ compress methods --json
    """
    every: dict[str, Any] = {**METHODS, **PRUNING, **LOSSES}
    listed: dict[str, dict[str, Any]] = {
        name: {
            "stage": "distill" if name in LOSSES else "prune" if name in PRUNING else "quantize",
            "summary": config.summary,
            "paper": config.paper,
            "calibrated": config.calibrated,
            "settings": _settings(config),
        }
        for name, config in every.items()
    }
    refining = {"summary": RefineConfig.summary, "paper": RefineConfig.paper, "settings": _settings(RefineConfig)}
    document = {
        "methods": listed,
        "refine": refining,
        "schemes": {name: {"bits": int(name[1]), "symmetric": "ASYM" not in name} for name in INTEGER_SCHEMES}
        | {
            name: {"bits": s.bits, "symmetric": s.symmetric, "meaning": MEANINGS[name]}
            for name, s in FIXED_SCHEMES.items()
        },
        "group_size": "a divisor of the linear's input width, or channel",
        "sparsity": "a share of each linear's weights, or a pattern n:m whose m divides the linear's input width",
    }
    rows = [("METHOD", "STAGE", "CALIBRATED", "PAPER", "SUMMARY")]
    rows += [
        (name, each["stage"], "yes" if each["calibrated"] else "no", each["paper"], each["summary"])
        for name, each in listed.items()
    ]
    lines = [
        *columns(rows),
        "",
        f"after a method of `quantize`, --refine: {RefineConfig.summary} ({RefineConfig.paper})",
        f"schemes of weights alone: W{BITS[0]}A16 to W{BITS[-1]}A16; with _ASYM, zero points are stored; W4A16-g64, "
        "W4A16-channel: with the group size too",
        "group size: a divisor of the linear's input width, or channel",
        "schemes of weights and inputs:",
        *(f"  {line}" for line in columns(list(MEANINGS.items()))),
        "sparsity: a share of each linear's weights, or a pattern n:m whose m divides the linear's input width",
    ]
    view.result(document, lines)
    view.table(
        "Settings in a recipe, under `method:` (of refine, under `refine:`)",
        ("METHOD", "SETTING", "DEFAULT", "MEANING"),
        [
            (name, key, setting["default"], setting["description"])
            for name, entry in {**listed, "refine": refining}.items()
            for key, setting in entry["settings"].items()
        ],
    )


def _settings(config: type[BaseModel]) -> dict[str, Any]:
    return {
        key: {"default": _plain(field.default), "description": field.description}
        for key, field in config.model_fields.items()
        if key != "kind"
    }


def _plain(default: Any) -> Any:
    """A setting's default as plain data; that of a nested method is its name."""
    return default.kind if hasattr(default, "kind") else default

"""The frozen quality comparison: which models, schemes, methods and seeds. Change it only together with the results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SAMPLES = 64
SEQ_LEN = 512
EVAL_TOKENS = 65_536
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Model:
    """One model: where it is from ("packaged", "shared:FOLDER", "twin:MODEL", "path:DIR") and its corpus."""

    source: str
    corpus: str
    schemes: tuple[tuple[int, int | str], ...]
    """(bits, group size or "channel")"""


@dataclass(frozen=True)
class Variant:
    """One method with its settings, as it is named in the table; `peer` says that llm-compressor runs it too."""

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    peer: bool = True


MODELS: dict[str, Model] = {
    "tales-6m": Model("shared:tales-6m", "tales", ((4, 128), (3, 128), (2, 128))),
    "tales-6m-twin": Model("twin:tales-6m", "tales", ((4, 128), (3, 128), (2, 128))),
    "stories260K": Model("shared:stories260K", "tinystories", ((4, "channel"), (3, "channel"))),
    "packaged": Model("packaged", "tales", ((4, 128), (3, 128))),
    "packaged-twin": Model("twin:packaged", "tales", ((4, 128), (3, 128))),
}

VARIANTS: dict[str, Variant] = {
    "rtn": Variant("rtn"),
    "gptq": Variant("gptq"),
    "awq": Variant("awq"),
    # What remains of AWQ without its scales, clipping alone: the difference is what the scales are worth.
    "awq-identity": Variant("awq", {"scale_search": False}, peer=False),
    "autoround": Variant("autoround", peer=False),
}

USUAL = ("rtn", "gptq", "awq", "awq-identity")
"""Those of the table; the others take minutes of a processor each, and are made where they are asked for."""

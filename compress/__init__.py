"""Takes a Hugging Face causal language model to a smaller one that is proven good enough.

The names below are resolved on first use, so that `import compress` costs nothing: torch and transformers are
imported by the modules that need them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from compress.artifact.reader import Artifact as Artifact
    from compress.content import default_model as default_model
    from compress.errors import CompressError as CompressError
    from compress.runtime.llm import LLM as LLM
    from compress.runtime.protocol import SamplingParams as SamplingParams
    from compress.workflows.api import distill as distill
    from compress.workflows.api import evaluate as evaluate
    from compress.workflows.api import gate as gate
    from compress.workflows.api import load as load
    from compress.workflows.api import plan as plan
    from compress.workflows.api import prune as prune
    from compress.workflows.api import quantize as quantize

_HOME = {
    "Artifact": "compress.artifact.reader",
    "CompressError": "compress.errors",
    "LLM": "compress.runtime.llm",
    "SamplingParams": "compress.runtime.protocol",
    "default_model": "compress.content",
    "distill": "compress.workflows.api",
    "evaluate": "compress.workflows.api",
    "gate": "compress.workflows.api",
    "load": "compress.workflows.api",
    "plan": "compress.workflows.api",
    "prune": "compress.workflows.api",
    "quantize": "compress.workflows.api",
}

__all__ = [
    "LLM",
    "Artifact",
    "CompressError",
    "SamplingParams",
    "default_model",
    "distill",
    "evaluate",
    "gate",
    "load",
    "plan",
    "prune",
    "quantize",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])

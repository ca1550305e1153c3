"""The tiny models and texts of the pipeline's tests."""

from tests.pipeline.conftest import _quiet, text, tiny

__all__ = ["_quiet", "text", "tiny"]

"""lm-eval as a quiet library: no progress bars or log lines of its own, and templates that cannot reach out.

lm-eval renders prompts with a jinja environment that lets a template call any Python attribute, and compiles each
template anew for every item. Inside `quiet` it has a sandboxed one that compiles once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from unittest import mock

from jinja2 import StrictUndefined, Template
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Environment(ImmutableSandboxedEnvironment):
    """Refuses attributes that begin with an underscore and whatever changes an object."""

    def __init__(self, filters: dict[str, Any]) -> None:
        super().__init__(undefined=StrictUndefined, keep_trailing_newline=True)
        self.filters.update(filters)
        self._compiled = lru_cache(maxsize=256)(super().from_string)

    def from_string(self, source: Any, *_: Any, **__: Any) -> Template:
        """The compiled template of a source text."""
        return self._compiled(source)


@contextmanager
def quiet() -> Iterator[None]:
    """lm-eval says nothing below an error, and its templates run in a sandbox."""
    import datasets
    import lm_eval.api.task
    import lm_eval.utils

    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    bars = datasets.utils.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with (
            mock.patch.object(lm_eval.api.task, "tqdm", lambda items, **_: items),
            mock.patch.object(lm_eval.utils, "env", _Environment(lm_eval.utils.env.filters)),
        ):
            yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()

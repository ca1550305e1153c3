"""transformers as a quiet library: what it has to say is in the errors raised here."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps bars and load reports of transformers and what it calls off the terminal, and restores its settings."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # compressed-tensors has no setting for its bars
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

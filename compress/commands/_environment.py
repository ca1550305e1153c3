"""Settings of the process that must hold before torch is imported, and that no library call should make."""

from __future__ import annotations

import gc
import logging
import os
import warnings

from compress.commands import _debug


def prepare(threads: int | None = None) -> None:
    """Silences the chatter of libraries (unless `--debug`) and fixes the number of CPU threads.

    Args:
        threads: CPU threads of torch and the native kernels; None leaves their default, all cores.
    """
    if not _debug.wanted():
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        warnings.filterwarnings("ignore")
        logging.getLogger().setLevel(logging.ERROR)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        import torch

        torch.set_num_threads(threads)


def import_models() -> None:
    """Imports what models need without collecting garbage meanwhile, and exempts it from later collections.

    Nearly every object that these imports make lives as long as the process; looking through them again and again takes
    a fifth of the start.
    """
    gc.disable()
    try:
        import compress.pipeline
        import compress.runtime.transformers_backend  # noqa: F401
    finally:
        gc.enable()
    gc.freeze()

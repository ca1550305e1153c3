"""KL of a finished artifact to its source, on the measuring text of a search."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from compress.pipeline.run import deterministic
from compress.runtime import transformers_backend

WINDOWS_AT_A_TIME = 2


def divergence(source: Path, artifact: Path, tokens: Tensor) -> float:
    """Mean over tokens (windows, seq) of KL(source || artifact) in nats, both in float32 by transformers.

    Does not depend on the number of threads.
    """
    base, other = (transformers_backend.load(path, "cpu", "float32") for path in (source, artifact))

    def total(windows: Tensor) -> float:
        with torch.inference_mode():
            wanted, found = (torch.log_softmax(model.score(windows).float(), -1) for model in (base, other))
            return float((wanted.exp() * (wanted - found)).sum(dtype=torch.float64))

    with deterministic() as workers:
        return max(sum(workers.pool.map(total, tokens.split(WINDOWS_AT_A_TIME))) / tokens.numel(), 0.0)

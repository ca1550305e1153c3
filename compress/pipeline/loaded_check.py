"""Before a model of another shape appears: transformers loads it, and computes what the live blocks computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compress.errors import WorkError
from compress.models.quiet import quiet
from compress.pipeline.inputs import Activations
from compress.pipeline.work import Work

# The loaded model's logits may differ from the live blocks' by this share of their norm: the order of sums, no more.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def check_loaded(job: Work, directory: Path, leaving: Activations) -> None:
    """Refuses a directory that transformers does not load as the model that was cut, with a KV cache and without.

    leaving: the activations behind the last block. Raises WorkError.
    """
    from transformers import AutoModelForCausalLM

    assert job.calibration is not None
    tokens = job.calibration.tokens[:1]
    wanted = job.skeleton.head(leaving.quantized[0][:1])
    with quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=job.skeleton.dtype, output_loading_info=True, local_files_only=True
        )
    model, info = loaded
    strays = [name for names in info.values() for name in names]
    with torch.inference_mode():
        found = model.eval()(tokens, use_cache=False).logits.float()
        before = model(tokens[:, :-1], use_cache=True)
        last = model(tokens[:, -1:], past_key_values=before.past_key_values).logits.float()
    change = max(_change(found, wanted), _change(last, wanted[:, -1:]))
    if strays or not change <= TOLERANCE[job.skeleton.dtype]:
        raise WorkError(
            f"transformers loads the cut model as another: its logits are {change:.1e} off, {len(strays)} tensors "
            "do not fit",
            "nothing was published; report this model's config.json",
        )


def _change(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())

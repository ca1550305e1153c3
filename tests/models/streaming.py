"""The whole model through the streaming loader, and through transformers as the oracle."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from compress.models.checkpoint import Checkpoint
from compress.models.skeleton import Skeleton


def open_skeleton(path: Path, dtype: torch.dtype = torch.float32) -> Skeleton:
    return Skeleton(Checkpoint.open(path), dtype)


def streamed_logits(skeleton: Skeleton, tokens: torch.Tensor) -> torch.Tensor:
    hidden, calls = skeleton.embed(tokens)
    for block in range(skeleton.num_blocks):
        module = skeleton.materialise(block)
        hidden = skeleton.run_block(module, hidden, calls[block])
        skeleton.release(module)
    return skeleton.head(hidden)


def oracle_logits(path: Path, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    with torch.no_grad():
        return model(tokens, use_cache=False).logits.float()

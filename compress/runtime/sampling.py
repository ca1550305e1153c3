"""Choosing the next token from logits: greedy, temperature, top-k and top-p, from a private random generator."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import WorkError
from compress.runtime.protocol import SamplingParams


def seeded(params: SamplingParams, index: int) -> torch.Generator:
    """The generator of prompt number `index`; the global random state is neither read nor moved."""
    generator = torch.Generator(device="cpu")
    generator.manual_seed((params.seed + index) % 2**63)
    return generator


def next_token(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """One token id from logits (vocab,). Greedy takes the lowest id among equals.

    Sampling is done in float64 on the CPU, so that a seed means the same draw on every device.

    Raises:
        WorkError: the logits are not finite.
    """
    if not bool(torch.isfinite(logits).all()):
        raise WorkError(
            "the model's logits are not finite", "the weights are damaged or the dtype overflows; try --dtype float32"
        )
    if params.temperature == 0.0:
        return int(logits.argmax())
    probabilities = filtered(logits.double().cpu() / params.temperature, params)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def filtered(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities (vocab,) after top-k, then top-p: the smallest set of likeliest tokens that holds `top_p`."""
    if 0 < params.top_k < logits.numel():
        kept = torch.full_like(logits, float("-inf"))
        values, indices = logits.topk(params.top_k)
        logits = kept.scatter(0, indices, values)
    probabilities = logits.softmax(0)
    if params.top_p < 1.0:
        ordered, indices = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered
        ordered = ordered.masked_fill(before >= params.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(0, indices, ordered)
        probabilities = probabilities / probabilities.sum()
    return probabilities

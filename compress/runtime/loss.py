"""What a way of computing costs: KL to the exact one, on tokens that a model predicts over its own pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.errors import UserError

if TYPE_CHECKING:
    from compress.runtime.paged_model import PagedModel


def predictions(model: PagedModel, tokens: Sequence[int]) -> Tensor:
    """Log-probabilities (tokens, vocabulary) float64, as the model computes just now.

    Raises:
        UserError: the model's cache has no room for the tokens.
    """
    pages, count = model.pages, len(tokens)
    if pages.pages_for(count) > pages.count:
        raise UserError(
            f"measuring takes {count} tokens of a key-value cache that has room for {pages.count * pages.tokens}",
            "give a larger cache_tokens",
        )
    with pages.lend(count) as lent, torch.inference_mode():
        return model.sequence(tokens, 0, lent, range(count)).double().log_softmax(-1)


def divergence(exact: Tensor, found: Tensor) -> float:
    """KL in nats per token of log-probabilities (tokens, vocabulary) to exact ones."""
    return float((exact.exp() * (exact - found)).sum(-1).mean())

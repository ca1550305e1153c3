"""Attention of whole sequences through the native kernel, as an attention implementation of transformers.

Calibration runs every token through every block, and torch's own CPU kernel spends a fifth of that time in attention.
What the kernel does not do (gradients, masks, dropout, caches, other devices) goes to transformers' sdpa, unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from compress.kernels import dispatch

NAME = "compress"
SHORTEST = 16  # below, packing costs more than it saves


def use(model: PreTrainedModel) -> None:
    """Lets a model that would run sdpa run this instead; any other implementation was chosen for a reason and stays."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, attention_forward)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of query (batch, heads, tokens, dim): (batch, tokens, heads, dim), as transformers wants it."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    special = any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias", "cache"))
    if (
        attention_mask is None and causal and not special and not dropout
        and query.dtype == key.dtype == value.dtype and not (torch.is_grad_enabled() and query.requires_grad)
        and query.device.type == "cpu" and query.dtype in (torch.float32, torch.bfloat16)
        and query.shape[2] >= SHORTEST and key.shape[2:] == value.shape[2:] == query.shape[2:]
    ):  # fmt: skip
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return dispatch.causal_attention(query, key, value, scale), None
    found: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return found

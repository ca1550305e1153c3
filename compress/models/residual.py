"""What reads and writes the residual stream, and which rows are a head's values, for methods that rotate them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

NORMS = ("input_layernorm", "post_attention_layernorm")
"""The norms that read the stream in every family of ROTATABLE, by the end of their names."""
WRITERS = (".o_proj", ".down_proj", ".w2")
"""The linears that write to it, by the end of their names."""

ROTATABLE = ("deepseek_v3", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe")
HEADS_ONLY = ("gemma2", "gemma3_text")
"""Their norms behind attention and MLP scale channels on the way into the stream."""
WITH_MEAN = ("gpt2", "gpt_neox", "opt")
"""Their layer norms subtract a mean, which no rotation keeps."""


@dataclass(frozen=True, slots=True)
class Values:
    """The linear whose rows hold the values: `heads` runs of `size` rows, every `stride` rows from `start`."""

    linear: str
    start: int
    heads: int
    stride: int
    size: int


def values(config: dict[str, Any], model_type: str) -> Values:
    """Where the values are in a block, from config.json; o_proj reads heads of the same size side by side."""
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    if model_type == "deepseek_v3":  # every head has its keys without position before its values
        keys, size = int(config["qk_nope_head_dim"]), int(config["v_head_dim"])
        return Values("self_attn.kv_b_proj", keys, heads, keys + size, size)
    size = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    if model_type == "phi3":
        return Values("self_attn.qkv_proj", (heads + kv_heads) * size, kv_heads, size, size)
    return Values("self_attn.v_proj", 0, kv_heads, size, size)

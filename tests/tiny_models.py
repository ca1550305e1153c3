"""Tiny random checkpoints of every supported family, written by transformers itself.

Sizes are small and uneven, biases and ties are on where the family has them, query heads are grouped where it can,
and sliding windows are shorter than the sequences of the tests. Every directory has a byte-level tokenizer.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 259
POSITIONS = 64
EXPERTS = 8

_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
    "tie_word_embeddings": True,
}
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16}
_WINDOWS: dict[str, Any] = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "tie_word_embeddings": False}

_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_GROUPED, "attention_bias": True, "mlp_bias": True},
    "mistral": {**_GROUPED, "sliding_window": 5},
    "qwen2": {**_GROUPED, **_WINDOWS, "use_sliding_window": True},
    "qwen3": {**_GROUPED, "attention_bias": True, "tie_word_embeddings": False},
    "gemma2": {**_GROUPED, **_WINDOWS, "query_pre_attn_scalar": 24, "attention_bias": True},
    "gemma3_text": {**_GROUPED, **_WINDOWS, "query_pre_attn_scalar": 24, "attention_bias": True},
    "phi3": {"num_key_value_heads": 2, "sliding_window": 5, "tie_word_embeddings": False},
    "gpt2": {"n_inner": 160},
    "opt": {"ffn_dim": 160, "word_embed_proj_dim": 64},
    "gpt_neox": {"rotary_pct": 0.25},
    "mixtral": {**_GROUPED, **_MOE, "num_local_experts": EXPERTS},
    "qwen3_moe": {**_GROUPED, **_MOE, "num_experts": EXPERTS, "moe_intermediate_size": 32, "mlp_only_layers": [0]},
    "deepseek_v3": {
        **_MOE,
        "num_key_value_heads": 6,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "attention_bias": True,
    },
}

FAMILIES: tuple[str, ...] = tuple(_CONFIGS)
"""The supported model types, one tiny model each."""


def tiny_model(
    model_type: str, path: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> Path:
    """Writes a tiny random model with its tokenizer to `path` and returns it; `overrides` change its configuration."""
    config = CONFIG_MAPPING[model_type](**{**_SHARED, **_CONFIGS[model_type], **overrides})
    model = AutoModelForCausalLM.from_config(config)
    randomise(model, seed)
    model.to(dtype).save_pretrained(path)
    _tokenizer().save_pretrained(path)
    return path


def tiny_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids of this shape, within every tiny model's vocabulary."""
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Gives every tensor a random value, norms and biases too, so that nothing equals its default."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim >= 2:
                tensor.copy_(noise * (1.0 if "embed" in name or "wte" in name else 1.5 / math.sqrt(tensor.shape[-1])))
            elif "norm" in name or "ln_" in name:
                tensor.add_(0.3 * noise)
            else:
                tensor.copy_(0.2 * noise)


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte and three special ones: any text has ids, and they are the same on every machine."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", model_max_length=POSITIONS
    )

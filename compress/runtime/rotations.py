"""What turns queries and keys: frequencies and factors as transformers computes them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from compress.runtime.native_shape import Shape


def rotations(shape: Shape) -> dict[str, tuple[Tensor, float]]:
    """By layer type: frequencies (turned numbers of a head / 2) float32, and the factor of cosines and sines.

    LongRoPE has those of long contexts behind the others.
    """
    if shape.family.rope_by_type:
        from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

        typed: Any = Gemma3RotaryEmbedding(shape.config)
        return {
            kind: (getattr(typed, f"{kind}_inv_freq").float(), float(getattr(typed, f"{kind}_attention_scaling")))
            for kind in typed.layer_types
        }
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    rotary: Any = (Phi3RotaryEmbedding if shape.family.partial_rotary else LlamaRotaryEmbedding)(shape.config)
    found = {"": (rotary.inv_freq.float(), float(rotary.attention_scaling))}
    if rotary.rope_type == "longrope":
        beyond = shape.config.rope_parameters["original_max_position_embeddings"] + 1
        frequencies, factor = ROPE_INIT_FUNCTIONS["longrope"](shape.config, seq_len=beyond)
        found["long"] = (frequencies.float(), float(factor))
    return found

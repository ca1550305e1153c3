"""What turns queries and keys: frequencies and factors as transformers computes them."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from compress.errors import UserError
from compress.runtime.native_shape import Shape


def rotations(shape: Shape) -> dict[str, tuple[Tensor, float]]:
    """By layer type: frequencies (turned numbers of a head / 2) float32, and the factor of cosines and sines.

    LongRoPE has those of long contexts behind the others.

    Raises:
        UserError: the config gives no finite ones, or more than a head has.
    """
    try:
        found = _computed(shape)
    except Exception as error:  # transformers takes the numbers as they are: any of its arithmetic may fail on them
        raise _wrong(str(error)) from error
    for frequencies, factor in found.values():
        if frequencies.ndim != 1 or not 1 <= len(frequencies) <= shape.head_dim // 2:
            raise _wrong(f"frequencies of shape {tuple(frequencies.shape)} for heads of {shape.head_dim}")
        if not bool(frequencies.isfinite().all()) or not math.isfinite(factor):
            raise _wrong("frequencies or a factor that are not finite")
    if len({len(frequencies) for frequencies, _ in found.values()}) > 1:
        raise _wrong("frequencies of several lengths")
    return found


def _wrong(reason: str) -> UserError:
    return UserError(
        f"the rotary embedding of config.json cannot be computed: {reason}",
        "fetch the model again, or mend the file",
    )


def _computed(shape: Shape) -> dict[str, tuple[Tensor, float]]:
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

"""What the native engine knows of each family, as data: names, norms, windows, experts, and what its config calls them.

A family of this kind is a row in `NATIVE_FAMILIES`; everything else follows from the config.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compress.models.families import ExpertNames, family_of


@dataclass(frozen=True, slots=True)
class NativeFamily:
    """How one architecture differs from Llama's.

    head_norms: queries and keys are normed head by head. offset_norms: norms compute with 1 + w. out_norms: what
    attention and the feed-forward part give is normed before it is added. scaled: embeddings are multiplied by the
    root of their length and scores divided by that of `query_pre_attn_scalar`. fused: q, k, v and gate, up are stored
    as one matrix each. one_window: `sliding_window` holds for every layer, else where `layer_types` says so.
    rope_by_type: each layer type has its own rotation. partial_rotary: the config may have only the beginning of each
    head turned. experts: the config's names for the number of experts and
    their width; None: no mixture.
    """

    model_type: str
    head_norms: bool = False
    offset_norms: bool = False
    out_norms: bool = False
    scaled: bool = False
    fused: bool = False
    one_window: bool = False
    rope_by_type: bool = False
    partial_rotary: bool = False
    experts: tuple[str, str] | None = None

    @property
    def expert_names(self) -> ExpertNames:
        """What checkpoints call an expert's three linears."""
        names = family_of(self.model_type).experts
        assert names is not None
        return names

    def mixes(self, config: Any, layer: int) -> bool:
        """Whether a layer has experts."""
        if self.experts is None:
            return False
        step = getattr(config, "decoder_sparse_step", 1)
        return layer not in (getattr(config, "mlp_only_layers", None) or ()) and (layer + 1) % step == 0


NATIVE_FAMILIES: dict[str, NativeFamily] = {
    family.model_type: family
    for family in (
        NativeFamily("llama"),
        NativeFamily("mistral", one_window=True),
        NativeFamily("qwen2"),
        NativeFamily("qwen3", head_norms=True),
        NativeFamily("gemma2", offset_norms=True, out_norms=True, scaled=True),
        NativeFamily("gemma3_text", head_norms=True, offset_norms=True, out_norms=True, scaled=True, rope_by_type=True),
        NativeFamily("phi3", fused=True, one_window=True, partial_rotary=True),
        NativeFamily("mixtral", one_window=True, experts=("num_local_experts", "intermediate_size")),
        NativeFamily("qwen3_moe", head_norms=True, one_window=True, experts=("num_experts", "moe_intermediate_size")),
    )
}

"""A causal language model on the meta device: transformers' own modules, no weights, real small buffers.

The buffers that a checkpoint does not hold (rotary frequencies, Gemma's embedding scale) are computed the way
`from_pretrained` computes them, by the model's own initialiser.
"""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from compress.errors import UserError, WorkError
from compress.formats.bitmask import FORMAT
from compress.formats.compressed_tensors import is_for_own_reader
from compress.models import attention
from compress.models.checkpoint import Checkpoint
from compress.models.experts import Experts
from compress.models.families import ExpertNames, Family, family_of

_MULTIMODAL = ("vision_config", "audio_config", "text_config", "vision_tower")


def supported_family(checkpoint: Checkpoint) -> Family:
    """The checkpoint's Family; raises UserError for an already quantised, multimodal or unknown model."""
    config = checkpoint.config
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and is_for_own_reader(quantization) and quantization.get("format") == FORMAT:
        raise UserError(
            f"{checkpoint.path} stores its zeros packed ({FORMAT}), which is for running it",
            f"start from a dense copy: `compress export {checkpoint.path} --to dense`",
        )
    if quantization:
        named = quantization if isinstance(quantization, dict) else {}
        method = named.get("quant_method") or named.get("reader") or quantization
        made_by = "an artifact that compress quantised" if checkpoint.is_artifact else "already quantised"
        raise UserError(
            f"{checkpoint.path} is {made_by} ({method}): codes are neither quantised again nor pruned",
            "start from the full-precision model that it was made from",
        )
    if found := [key for key in _MULTIMODAL if key in config]:
        raise UserError(
            f"{checkpoint.path} is a multimodal model (config.json has {found[0]})",
            "only text models are supported: extract its language model first",
        )
    return family_of(config.get("model_type"))


def build(config: dict[str, Any], family: Family, dtype: torch.dtype) -> PreTrainedModel:
    """The model of config.json in eval mode, parameters on meta in `dtype`, experts as one linear each.

    Raises UserError where transformers cannot build a model from this config.
    """
    try:
        parsed = CONFIG_MAPPING[family.model_type].from_dict(copy.deepcopy(config))
        parsed.output_router_logits = False
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(parsed, dtype=dtype, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"transformers cannot build a {family.model_type} model from config.json: {' '.join(str(error).split())}",
            "restore config.json from the model's source",
        ) from error
    attention.use(model)
    _fill_buffers(model)
    split_experts(model, family)
    return cast(PreTrainedModel, model.eval())


def split_experts(model: nn.Module, family: Family) -> list[str]:
    """Puts one linear each in the place of fused experts, weights unset; gives the module paths of what it replaced."""
    if family.experts is None:
        return []
    replaced = []
    for number, block in enumerate(blocks_of(model, family)):
        if _split_experts(block, family.experts):
            replaced.append(f"{family.blocks}.{number}.{family.experts.path}")
    return replaced


def blocks_of(model: nn.Module, family: Family) -> list[nn.Module]:
    """The model's decoder blocks in order."""
    return list(cast(nn.ModuleList, model.get_submodule(family.blocks)))


def _fill_buffers(model: PreTrainedModel) -> None:
    """Gives every non-persistent buffer its value; NaN marks those that the initialiser forgot."""
    for name, module in model.named_modules():
        left_out = module._non_persistent_buffers_set
        buffers = {key: b for key, b in module._buffers.items() if key in left_out and b is not None}
        if not buffers:
            continue
        for key, buffer in buffers.items():
            module._buffers[key] = torch.full_like(buffer, math.nan, device="cpu")
        model._init_weights(module)
        for key in buffers:
            if module.get_buffer(key).isnan().any():
                raise WorkError(
                    f"transformers left the buffer {name}.{key} without a value", "report this model's config.json"
                )


def _split_experts(block: nn.Module, names: ExpertNames) -> bool:
    parent_path, _, leaf = names.path.rpartition(".")
    parent = block.get_submodule(parent_path)
    fused = getattr(parent, leaf, None)
    if fused is None:
        return False
    setattr(parent, leaf, Experts.replacing(fused, names))
    return True

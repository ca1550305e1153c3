"""A model directory as a dense transformers model, with every key accounted for.

Plain checkpoints go through transformers as they are. Quantised ones are decoded by our own reader and handed to the
same loader, which fuses experts; their linears then round their inputs where the scheme says so. Other weight-only
compressed-tensors formats are dequantised by transformers. Nothing that a model directory holds is executed or
unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from compress.errors import CompressError, IntegrityError, UserError
from compress.models.checkpoint import Checkpoint
from compress.models.quiet import quiet
from compress.runtime import native_reader
from compress.runtime.config_checks import check_counts
from compress.runtime.kv_cache import round_cache_of, stored_scales
from compress.runtime.memory import guarded
from compress.runtime.rounded_inputs import round_inputs_of

_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def load_model(
    checkpoint: Checkpoint, dtype: torch.dtype, left_out: Mapping[str, Sequence[int]] = MappingProxyType({})
) -> Any:
    """The causal language model in eval mode on the CPU, weights rounded as stored and then cast to `dtype`.

    left_out: quantised linears, with the shape of their weights in the model, for which the caller has packed ones:
    they come with zeros that take no memory, and round no inputs.

    Raises:
        UserError: an architecture or a quantisation that this back end does not read.
        IntegrityError: a tensor missing, left over, or of the wrong shape.
        WorkError: out of memory.
    """
    with quiet():
        config = load_config(checkpoint)
        meta = meta_model(checkpoint, config)
        try:
            with guarded("loading the model"):
                model, report = _load(checkpoint, config, meta, dtype, left_out)
        except CompressError:
            raise
        except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
            raise IntegrityError(
                f"transformers could not load {checkpoint.path}: {_first_line(error)}",
                "its weights and its config.json do not belong together: fetch or make it again",
            ) from error
    _check_complete(checkpoint, report)
    if native_reader.reads(checkpoint.config):
        schemes = native_reader.input_schemes(checkpoint)
        round_inputs_of(model, {name: each for name, each in schemes.items() if name not in left_out})
        round_cache_of(model, stored_scales(checkpoint))
    return model.eval()


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The directory's tokenizer; raises UserError where there is none."""
    from transformers import AutoTokenizer

    with quiet():
        try:
            return AutoTokenizer.from_pretrained(str(checkpoint.path), **_LOCAL)
        except Exception as error:
            raise UserError(
                f"{checkpoint.path} holds no tokenizer that can be read: {_first_line(error)}",
                "copy tokenizer.json and tokenizer_config.json of the model into the directory",
            ) from error


def end_tokens(checkpoint: Checkpoint, tokenizer: Any) -> frozenset[int]:
    """Ids that end an answer: the generation config's, else the model config's, and the tokenizer's own."""
    found: list[Any] = [tokenizer.eos_token_id]
    from transformers import GenerationConfig

    source: Any = checkpoint.config
    if (checkpoint.path / "generation_config.json").is_file():
        try:
            source = GenerationConfig.from_pretrained(str(checkpoint.path), local_files_only=True).to_dict()
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{checkpoint.path / 'generation_config.json'} cannot be read: {_first_line(error)}",
                "repair the file or remove it",
            ) from error
    ids = source.get("eos_token_id")
    found += ids if isinstance(ids, list) else [ids]
    return frozenset(int(i) for i in found if i is not None)


def load_config(checkpoint: Checkpoint) -> Any:
    """What transformers makes of the directory's config.json; raises UserError for what it does not know."""
    from transformers import AutoConfig

    check_counts(checkpoint)
    try:
        return AutoConfig.from_pretrained(str(checkpoint.path), **_LOCAL)
    except Exception as error:
        raise UserError(
            f"transformers does not know the model in {checkpoint.path}: {_first_line(error)}",
            "check model_type in its config.json; architectures that bring their own code are not loaded",
        ) from error


def meta_model(checkpoint: Checkpoint, config: Any) -> Any:
    """The model without weights, for its class and its layout.

    Raises:
        UserError: no causal language model of transformers has this config.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"{checkpoint.path} is not a causal language model that transformers can build: {_first_line(error)}",
            "give a text-generation model in Hugging Face form",
        ) from error


def _load(
    checkpoint: Checkpoint, config: Any, meta: Any, dtype: torch.dtype, left_out: Mapping[str, Sequence[int]]
) -> tuple[Any, dict[str, Any]]:
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    quantization = checkpoint.config.get("quantization_config")
    if native_reader.reads(checkpoint.config):
        del config.quantization_config
        state: dict[str, Any] = {**native_reader.dense_state(checkpoint, native_reader.conv1d_linears(meta))}
        state |= {f"{name}.weight": torch.zeros((), dtype=dtype).expand(*shape) for name, shape in left_out.items()}
        return type(meta).from_pretrained(None, config=config, state_dict=state, **options)
    if quantization:
        _check_dequantizable(checkpoint, quantization)
        config.quantization_config = {**quantization, "dequantize": True}
    return type(meta).from_pretrained(
        str(checkpoint.path), config=config, use_safetensors=True, local_files_only=True, **options
    )


def _check_dequantizable(checkpoint: Checkpoint, quantization: dict[str, Any]) -> None:
    method = quantization.get("quant_method")
    if method != "compressed-tensors":
        raise UserError(
            f"{checkpoint.path} is quantised with {method!r}, which is not read here",
            "give its full-precision source, or a compressed-tensors export of it",
        )
    groups = quantization.get("config_groups") or {}
    if any(isinstance(group, dict) and group.get("input_activations") for group in groups.values()):
        raise UserError(
            f"{checkpoint.path} rounds the inputs of its linears in a way that is not read here",
            "scores without that rounding would flatter it; W8A8, FP8, NVFP4 and MXFP with symmetric inputs are read",
        )
    if len(groups) > 1:
        raise UserError(
            f"{checkpoint.path} mixes several compressed-tensors schemes of which some are not packed integers",
            "transformers dequantises all layers of such a model by the first scheme, so it is refused",
        )


def _check_complete(checkpoint: Checkpoint, report: dict[str, Any]) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs", "conversion_errors"):
        if found := report.get(kind):
            names = ", ".join(sorted(str(key) for key in found)[:3])
            raise IntegrityError(
                f"{checkpoint.path} does not fit its config.json: {len(found)} {kind.replace('_', ' ')} ({names} ...)",
                "its weights and its config.json do not belong together: fetch or make it again",
            )


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

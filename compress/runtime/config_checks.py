"""Numbers in a config.json that no model has, refused before anything is made of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from compress.errors import UserError
from compress.models.checkpoint import Checkpoint
from compress.runtime.native_families import NativeFamily

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")
_MOST = 2**40


def check_counts(checkpoint: Checkpoint) -> None:
    """Layers are no more than the checkpoint's tensors, and experts no more than the longest side of one.

    Asked before transformers sees the config, which makes lists, and then modules, of so many.

    Raises:
        UserError: they are more.
    """
    index = checkpoint.index
    longest = max((size for info in index.values() for size in info.shape), default=0)
    text = checkpoint.config.get("text_config")
    for config in (checkpoint.config, text if isinstance(text, dict) else {}):
        for names, most in ((_LAYERS, len(index)), (_EXPERTS, longest)):
            for name in names:
                value = config.get(name)
                if isinstance(value, Real) and not 0 <= float(value) <= most:
                    raise _wrong(name, value, f"the tensors of {checkpoint.path} leave room for 0 to {most}")


def check_numbers(config: Any, family: NativeFamily) -> None:
    """What the engine reads of a config that transformers has made.

    Raises:
        UserError: a number that is none, or is out of its range.
    """
    rules: list[tuple[str, Callable[[Any], bool], str]] = [
        *((name, _whole, "a whole number from 1 on") for name in _SIZES),
        *((name, _whole_or_none, "a whole number from 1 on, or null") for name in _OPTIONAL),
        ("rms_norm_eps", _positive, "a positive number"),
    ]
    if family.scaled:
        rules.append(("query_pre_attn_scalar", _positive, "a positive number"))
        rules += [(name, _positive_or_none, "a positive number, or null") for name in _CAPS]
    if family.experts is not None:
        rules += [(name, _whole, "a whole number from 1 on") for name in (*family.experts, "num_experts_per_tok")]
        rules.append(("decoder_sparse_step", _whole_or_none, "a whole number from 1 on"))
    for name, allowed, rule in rules:
        value = getattr(config, name, None)
        if not allowed(value):
            raise _wrong(name, value, f"it must be {rule}")


_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
    "max_position_embeddings",
)
_OPTIONAL = ("num_key_value_heads", "head_dim", "sliding_window")
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and 1 <= value <= _MOST


def _whole_or_none(value: Any) -> bool:
    return value is None or _whole(value)


def _positive(value: Any) -> bool:
    return isinstance(value, Real) and 0 < float(value) < math.inf


def _positive_or_none(value: Any) -> bool:
    return value is None or _positive(value)


def _wrong(name: str, value: object, rule: str) -> UserError:
    return UserError(f"config.json has {name} = {str(value)[:40]}: {rule}", "fetch the model again, or mend the file")

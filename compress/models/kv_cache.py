"""Keys and values on their way into the cache, after the rotary embedding, of any attention of transformers.

Attentions hand them to a cache through its `update`; a hook puts something in the cache's place that sees them first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

KEY_LINEARS = ("k_proj", "qkv_proj")
Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_CACHE = "past_key_values"


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """The attentions of a model or block that keep keys and values as they multiply them, by name."""
    return {name: module for name, module in model.named_modules() if key_linear(module) is not None}


def key_linear(module: nn.Module) -> str | None:
    """The child that makes the keys of an attention; None for what is none."""
    found = next((name for name in KEY_LINEARS if isinstance(getattr(module, name, None), nn.Module)), None)
    return found if found and _CACHE in inspect.signature(module.forward).parameters else None


def tap(attention: nn.Module, change: Change) -> None:
    """Makes an attention use what `change` gives for its keys and values (batch, heads, tokens, dim)."""

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, _CACHE: _Tapped(change, kwargs.get(_CACHE))}

    attention.register_forward_pre_hook(hook, with_kwargs=True)


class _Tapped:
    """A cache, or none, behind `change`."""

    def __init__(self, change: Change, cache: Any) -> None:
        self._change, self._cache = change, cache

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        key, value = self._change(key, value)
        if self._cache is None:
            return key, value
        found: tuple[Tensor, Tensor] = self._cache.update(key, value, *args, **kwargs)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

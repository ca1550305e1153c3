"""The linears of a dense transformers module: what each holds in memory and reads for a token."""

from __future__ import annotations

from typing import Any

from torch import nn

from compress.runtime.protocol import LayerUse


def dense_layers(model: nn.Module, kernel: str) -> list[LayerUse]:
    """Every module that owns a weight of two dimensions or more, embeddings alone left out.

    Fused experts (3-D parameters) are one entry per block, of which a token reads the share that the config's
    `num_experts_per_tok` routes it to. An embedding that is also the head's weight shows as the head's alias.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    found = []
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, nn.Embedding) or not any(parameter.ndim >= 2 for parameter in own):
            continue
        held = sum(parameter.numel() * parameter.element_size() for parameter in own)
        chosen, experts = _routing(model, module)
        found.append(
            LayerUse(
                name=name,
                aliases=tuple(other for parameter in own for other in owners[id(parameter)] if other != name),
                kernel=kernel,
                weights=sum(parameter.numel() for parameter in own),
                held_bytes=held,
                read_bytes=held * chosen // experts,
            )
        )
    return found


def _routing(model: nn.Module, module: nn.Module) -> tuple[int, int]:
    """(experts a token is sent to, experts there are); (1, 1) where the module holds none."""
    stacked = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim == 3]
    config: Any = getattr(model, "config", None)
    chosen = getattr(config.get_text_config(), "num_experts_per_tok", None) if config is not None else None
    if not stacked or not chosen:
        return 1, 1
    return min(chosen, len(stacked[0])), len(stacked[0])

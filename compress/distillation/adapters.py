"""LoRA through peft, and what it lacks: a sparse linear's adapter is masked, so that its zeros stay zeros.

LoRA: Hu et al., arXiv:2106.09685. A plain merge fills every zero of a pruned weight; here the masked product is what
the student computes with while it learns, so that merging changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from compress.errors import UserError

ADAPTER = "default"


class _Plain(nn.Module):
    """Holds a model without its config, by which peft would look for experts fused where they are linears here."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def add(model: nn.Module, rank: int, alpha: int, targets: list[str], seed: int) -> None:
    """Puts an adapter of `rank` on every linear of the model named in `targets`; all other weights are frozen.

    Raises:
        UserError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError(
            "training adapters needs peft, which is not installed",
            "pip install 'compress[distill]', or train all weights with --full",
        ) from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        names = [f"model.{name}" for name in targets]
        settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=names, bias="none")
        get_peft_model(_Plain(model), settings, autocast_adapter_dtype=False)


def layers(model: nn.Module) -> dict[str, Any]:
    """The adapted layers by the name that the linear had before."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def mask(layer: Any, kept: Tensor) -> None:
    """Lets the adapter of `layer` change only weights where `kept` (shape of the stored weight, bool) is True."""
    whole = layer.get_delta_weight

    def delta(adapter: str) -> Tensor:
        change: Tensor = whole(adapter)
        return change * kept.to(change.dtype)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = layer.get_base_layer()
        weight = base.weight + delta(ADAPTER).to(base.weight.dtype)
        return linear(x, weight if isinstance(base, nn.Linear) else weight.T, base.bias)

    layer.get_delta_weight = delta
    layer.forward = forward


def rounded(layer: Any, nearest: Callable[[Tensor], Tensor]) -> None:
    """Lets `layer` compute with its weight and adapter rounded by `nearest` ((out, in) float32 -> the same).

    Gradients go through the rounding as if it were none. Masks are set before.
    """

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = layer.get_base_layer()
        weight = base.weight + layer.get_delta_weight(ADAPTER).to(base.weight.dtype)
        error = nearest(weight.detach().float()).to(weight.dtype) - weight.detach()
        return linear(x, weight + error, base.bias)

    layer.forward = forward


def merged(
    found: Mapping[str, Any], sources: Mapping[str, Tensor], factors: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """The weights with their adapters in them, float32, by the name of the linear.

    Args:
        found: what `layers` gave.
        sources: the weight of each before training, as stored.
        factors: A (rank, in) and B (out, rank) of each in float32, which take the place of the layer's own.
    """
    weights = {}
    with torch.no_grad():
        for name, layer in found.items():
            a, b = factors[name]
            layer.lora_A[ADAPTER].weight = nn.Parameter(a, requires_grad=False)
            layer.lora_B[ADAPTER].weight = nn.Parameter(b, requires_grad=False)
            weights[name] = sources[name].float() + layer.get_delta_weight(ADAPTER)
    return weights

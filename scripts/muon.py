"""Muon: momentum orthogonalised by Newton-Schulz iterations, for the weight matrices of a network's hidden layers.

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024, kellerjordan.github.io/posts/muon);
arXiv:2502.16982 adds decoupled weight decay. Matrices of one shape are orthogonalised together as one batch, which is
what makes it quick for a small model with many equal blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# a x + b x^3 + c x^5 sends singular values from (0, 1] to near 1 in five rounds (coefficients of the post above).
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, rounds: int = 5) -> Tensor:
    """Nearly the closest semi-orthogonal matrices to a batch (n, rows, columns); bfloat16 inside on a GPU."""
    a, b, c = QUINTIC
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Steps of fixed spectral size along the orthogonalised Nesterov momentum; every parameter must be a matrix."""

    def __init__(
        self, parameters: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        if any(p.ndim != 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("Muon takes matrices only; give the other parameters to AdamW")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for (rows, columns), parameters in by_shape.items():
                gradients = torch.stack([p.grad for p in parameters if p.grad is not None])
                # The momentum of equal shapes lives under the first of them, as one tensor.
                state = self.state[parameters[0]]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(gradients)
                buffer = state["momentum"]
                buffer.lerp_(gradients, 1 - group["momentum"])
                updates = orthogonalise(gradients.lerp(buffer, group["momentum"]))
                size = group["lr"] * max(1.0, rows / columns) ** 0.5
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(updates.unbind()), alpha=-size)

"""SmoothQuant (Xiao et al., arXiv:2211.10438): ranges move from inputs, where they hurt, into weights.

A channel of inputs that is much larger than the others takes the whole range of a token's scale. Dividing it by s and
multiplying the weights that read it by s leaves the float model as it was. Equation 4: s_j = max |x_j|^alpha /
max |w_j|^(1 - alpha).

Two things differ from the paper. alpha is searched for each edge (producer -> consumers), by the output error of the
consumers with inputs and weights both rounded, on a sample of tokens. An error counts by the size of its own output,
token by token and linear by linear, or the few tokens with huge activations that attention rests on would decide alone.
And an edge stays as it is unless smoothing removes a good share of its error: below that, what differs is how the
rounding falls, which other tokens do not repeat.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.formats.inputs import round_inputs, static_scale
from compress.quantization import rtn
from compress.quantization.configs import RtnConfig, SmoothQuantConfig
from compress.types import Scheme

SMALLEST, LARGEST = 1e-4, 1e4


@dataclass(frozen=True, eq=False, slots=True)
class Smoothing:
    """Result of one edge's search: scale (in,) float32, or None where the identity won; losses for the report."""

    scale: Tensor | None
    alpha: float | None
    loss: float
    identity_loss: float


def search_scale(
    weights: Mapping[str, Tensor],
    highest: Tensor,
    sample: Tensor,
    scheme: Scheme,
    config: SmoothQuantConfig,
    pool: Executor,
) -> Smoothing:
    """Searches the scale of one edge.

    Args:
        weights: the consumers, (out, in) float32 each.
        highest: max |x_j| (in,) over all calibration tokens, of the inputs that the consumers share.
        sample: (tokens, in) float32, some of these inputs.
    """
    candidates = [(None, torch.ones_like(highest)), *_candidates(list(weights.values()), highest, config)]
    wanted = {name: sample @ weight.T for name, weight in weights.items()}
    sizes = {name: outputs.square().sum(1).clamp(min=1e-30) for name, outputs in wanted.items()}

    def loss(task: tuple[str, Tensor]) -> float:
        name, scale = task
        found = _rounded_product(weights[name], scale, highest, sample, scheme)
        return float(((found - wanted[name]).square().sum(1) / sizes[name]).mean())

    tasks = [(name, scale) for _, scale in candidates for name in weights]
    losses = torch.tensor(list(pool.map(loss, tasks)), dtype=torch.float64).reshape(len(candidates), -1).sum(1)
    best = int(losses.argmin())
    if losses[best] >= (1 - config.least_gain) * losses[0]:
        best = 0
    alpha, scale = candidates[best]
    return Smoothing(None if best == 0 else scale, alpha, float(losses[best]), float(losses[0]))


def _candidates(weights: list[Tensor], highest: Tensor, config: SmoothQuantConfig) -> list[tuple[float, Tensor]]:
    """(alpha, scale) of every grid point; channels that carry nothing keep 1."""
    reach = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    used = (highest > 0) & (reach > 0)
    found = []
    for i in range(config.grid):
        alpha = i / (config.grid - 1)
        scale = torch.where(used, highest.clamp(min=1e-12) ** alpha / reach.clamp(min=1e-12) ** (1 - alpha), 1.0)
        centre = (scale[used].max() * scale[used].min()).sqrt() if used.any() else 1.0
        found.append((alpha, torch.where(used, scale / centre, 1.0).clamp(SMALLEST, LARGEST)))
    return found


def _rounded_product(weight: Tensor, scale: Tensor, highest: Tensor, sample: Tensor, scheme: Scheme) -> Tensor:
    """What the linear gives for the sample (tokens, in) once its inputs are divided by `scale` and all is rounded."""
    assert scheme.inputs is not None
    static = None
    if not scheme.inputs.dynamic:
        static = torch.tensor([static_scale(max(float((highest / scale).max()), 1e-12), scheme.inputs)])
    inputs = round_inputs(sample / scale, scheme.inputs, static)
    rounded = rtn.transform(weight * scale, scheme, RtnConfig(scale_search=False), torch.float32)
    return inputs @ rounded.dequantize().float().T

"""Which inputs of a linear go, and the closed-form repair of what stays.

A linear y = W x whose inputs K stay and P go loses least, in least squares over the inputs x that it has now against
the outputs W x' that the original model wants, with

    W'_K = W* H[:, K] (H[K, K] + ridge I)^-1,    H = mean x x^T,    W* = W + W (mean (x' - x) x^T) H^-1,

which is FLAP's bias compensation (arXiv:2312.11983) carried to weights, or one step of optimal brain surgery over
groups of columns. Where the linear has a bias b, all this is about the mean, and b + W mean x' - W'_K mean x_K takes
up the rest, as FLAP's bias does. After that repair, removing one group G costs tr(W*_G ([H^-1]_GG)^-1 W*_G^T): the
score by which groups are removed, in rounds, H^-1 being taken over what is left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDS = 8


def survivors(weight: Tensor, hessian: Tensor, sections: int, size: int, keep: int) -> Tensor:
    """Which groups of `size` neighbouring inputs stay: `keep` in each of `sections` equal runs of inputs, sorted.

    weight (out, in), hessian (in, in) damped, both float32. Returns group numbers (sections * keep,) int64.
    """
    width = hessian.shape[0]
    groups = width // size
    members = torch.arange(width).reshape(groups, size)
    alive = torch.ones(groups, dtype=torch.bool)
    per_section = groups // sections
    for goal in _schedule(per_section, keep):
        left = alive.nonzero().squeeze(1)
        costs = _costs(weight, hessian, members[left])
        for section in range(sections):
            inside = (left // per_section == section).nonzero().squeeze(1)
            surplus = len(inside) - goal
            order = torch.argsort(costs[inside], stable=True)
            alive[left[inside[order[:surplus]]]] = False
    return alive.nonzero().squeeze(1)


def highest(scores: Tensor, sections: int, size: int, keep: int) -> Tensor:
    """As `survivors`, by the scores (in,) of single inputs, those of a group summed."""
    rows = scores.reshape(sections, -1, size).sum(2)
    best = torch.argsort(rows, dim=1, descending=True, stable=True)[:, :keep]
    return (best + torch.arange(sections).unsqueeze(1) * rows.shape[1]).reshape(-1).sort().values


def activation(weight: Tensor, hessian: Tensor) -> Tensor:
    """The mean square of every input (in,), as Minitron ranks them (arXiv:2407.14679); arguments as for `survivors`."""
    return hessian.diagonal().clone()


def feature(weight: Tensor, hessian: Tensor) -> Tensor:
    """The mean square of every input times the energy of its column in the directions v_k of the outputs, each
    weighted by how much they vary there, w_j^T (W H W^T) w_j = sum_k lambda_k (w_j v_k)^2, as SlimLLM has it: (in,).

    Arguments as for `survivors`.
    """
    return hessian.diagonal() * ((weight @ hessian @ weight.T @ weight) * weight).sum(0)


def common_survivors(places: Sequence[tuple[Tensor, Tensor]], keep: int) -> Tensor:
    """Which inputs stay that several linears share, `keep` of them: (keep,) int64 sorted.

    places: the weight (out, in) of each linear and the second moments (in, in) of its inputs, damped, both float32.
    What a removal costs each is counted as a share of the mean square of its outputs.
    """
    alive = torch.arange(places[0][1].shape[0])
    outputs = [float((weight @ hessian * weight).sum()) for weight, hessian in places]
    for goal in _schedule(len(alive), keep):
        members = alive.unsqueeze(1)
        costs = [_costs(*place, members) / output for place, output in zip(places, outputs, strict=True)]
        order = torch.argsort(torch.stack(costs).sum(0), descending=True, stable=True)
        alive = alive[order[:goal]].sort().values
    return alive


def _schedule(start: int, end: int) -> list[int]:
    """How many stay after each round, falling evenly from `start` to `end`."""
    steps = [round(start + (end - start) * turn / ROUNDS) for turn in range(1, ROUNDS + 1)]
    return [step for place, step in enumerate(steps) if step < (steps[place - 1] if place else start)]


def _costs(weight: Tensor, hessian: Tensor, members: Tensor) -> Tensor:
    """What removing each group (groups, size) of inputs costs after repair from the others that are listed."""
    listed = members.reshape(-1)
    kept = hessian[listed][:, listed]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(kept))
    best = torch.linalg.solve(kept, (weight @ hessian)[:, listed].T).T
    groups, size = members.shape
    if size == 1:
        return best.square().sum(0) / inverse.diagonal()
    blocks = inverse.reshape(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    columns = best.reshape(-1, groups, size).transpose(0, 1)
    return (columns @ torch.linalg.inv(blocks) * columns).sum((1, 2))


def repaired(weight: Tensor, hessian: Tensor, kept: Tensor) -> Tensor:
    """The weight (out, kept) that best does for (out, in) with the inputs `kept` alone; hessian (in, in) damped."""
    corner = hessian[kept][:, kept]
    return torch.linalg.solve(corner, (weight @ hessian)[:, kept].T).T.contiguous()

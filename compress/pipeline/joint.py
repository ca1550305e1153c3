"""Zeros and rounding in one pass: what of a linear is zero before GPTQ rounds the rest around it.

SparseGPT (arXiv:2301.00774, section 3.5) chooses the mask first; GPTQ then rounds what stays, both against the same
Hessian. The zeros of a source that was pruned before are kept in the same way.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.pruning import magnitude, sparsegpt
from compress.pruning.configs import SparseGptConfig
from compress.pruning.masks import zero_mask
from compress.quantization.configs import GptqConfig
from compress.quantization.gptq import Preconditioner
from compress.quantization.hessian import factor

REFIT_STEPS = int(SparseGptConfig.model_fields["refit_steps"].default)


@dataclass(frozen=True, eq=False, slots=True)
class Pruned:
    """A weight of which some is zero.

    target: (out, in) float32, whose rounding is to be found. zeros: (out, in) bool, what is zero in the end.
    corrected: whether the target undoes the error of earlier layers already.
    """

    target: Tensor
    zeros: Tensor
    corrected: bool


def pruned_before(
    method: GptqConfig,
    weight: Tensor,
    shared: Preconditioner,
    pool: Executor,
    missed: Tensor | None = None,
    recorded: bool = False,
) -> Pruned | None:
    """The zeros that weight (out, in) has, with those that the method is asked to make; None where there are none.

    missed: as `Preconditioner.corrected` takes it. recorded: as `zero_mask` takes it.
    """
    sparsity, before = method.to_sparsity(), zero_mask(weight, recorded)
    if sparsity is None:
        return None if before is None else Pruned(weight, before, corrected=False)
    target, corrected = weight, False
    ordered = None if shared.factored is None else (shared.factored.upper, shared.order)
    if ordered is not None and sparsity.of is not None and method.act_order:  # a pattern's columns stay neighbours
        stored = factor(shared.stats.hessian, method.damp_frac)
        ordered = None if stored is None else (stored.upper, torch.arange(weight.shape[1]))
    if ordered is None:
        zeros = magnitude.mask(weight, sparsity)
    else:
        if shared.correction is not None:
            target, corrected = shared.corrected(weight, pool, missed), True
        found = sparsegpt.prune(target, *ordered, sparsity, pool)
        target = sparsegpt.refit(target, found, shared.hessian, REFIT_STEPS, pool)
        zeros = found == 0
    zeros = zeros if before is None else zeros | before
    return Pruned(target.masked_fill(zeros, 0.0), zeros, corrected)

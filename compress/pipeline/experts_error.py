"""Which experts of a mixture stay, by what its output loses without them.

Not what an expert adds counts, but what is missing once its tokens go to the others, router weights normalised anew:
an expert with large outputs is worth little where another gives the same. Only the tokens that are routed to an expert
change when it goes, so that a round over all experts costs as many passes as a token has experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from compress.models.experts import Experts, keep_rows
from compress.pipeline.block import Workers
from compress.pipeline.experts_job import ExpertsJob
from compress.pipeline.inputs import Activations
from compress.pruning import experts

TOKENS = 4096
"""On the outputs of so many calibration tokens, at least, where there are that many."""
ROUNDS = 4
"""Experts go in at most so many rounds; what the others cost is measured anew after each."""


def staying(job: ExpertsJob, module: nn.Module, entering: Activations, workers: Workers) -> tuple[Tensor, Tensor]:
    """The experts that stay, sorted int64, and what each costs alone: (experts,) float64, the squared error of the
    mixture's output without it as a share of the output's square.

    The weights of the block are as they were afterwards.
    """
    cut, pool = job.cut, workers.pool
    whole = _Mixture(job, module)
    x = pool.submit(_entering, job, module, whole.module, entering).result()
    wanted = pool.submit(whole, x).result()
    gone, kept = torch.zeros(cut.experts, dtype=torch.bool), torch.arange(cut.experts)
    alone = torch.zeros(cut.experts, dtype=torch.float64)
    size, going = cut.experts // cut.groups, (cut.experts - cut.kept) // cut.groups
    rounds = min(ROUNDS, going)
    for number in range(rounds):
        now = whole.without(gone)
        routed = pool.submit(now.routed, x).result()
        error = _errors(pool.submit(now, x).result(), wanted)

        def lost(expert: int, gone: Tensor = gone, routed: Tensor = routed, error: Tensor = error) -> Tensor:
            at = (routed == expert).any(1).nonzero()[:, 0]
            fewer = gone.clone()
            fewer[expert] = True
            return (
                (_errors(whole.without(fewer)(x[at]), wanted[at]) - error[at]).sum() if len(at) else error.new_zeros(())
            )

        cost = torch.full((cut.experts,), -torch.inf, dtype=torch.float64)  # what is gone already stays so
        cost[kept] = torch.stack(list(pool.map(lost, kept.tolist())))
        if number == 0:
            alone = cost / wanted.double().square().sum()
        kept = experts.most_salient(cost, (size - going * (number + 1) // rounds) * cut.groups, cut.groups)
        gone = torch.ones_like(gone).index_fill_(0, kept, False)
    return kept, alone


def _errors(found: Tensor, wanted: Tensor) -> Tensor:
    """(tokens,) float64."""
    return (found.double() - wanted.double()).square().sum(1)


@torch.no_grad()
def _entering(job: ExpertsJob, module: nn.Module, mixture: nn.Module, entering: Activations) -> Tensor:
    """What the mixture reads of the first tokens: (tokens, hidden)."""
    seen: list[Tensor] = []
    handle = mixture.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, -2)))
    try:
        for run in entering.runs(job.skeleton, module):
            run()
            if sum(map(len, seen)) >= TOKENS:
                break
    finally:
        handle.remove()
    return torch.cat(seen)


class _Mixture:
    """A live mixture, or what it would be without some experts. Shares its weights; nothing of it is changed."""

    def __init__(self, job: ExpertsJob, block: nn.Module) -> None:
        family = job.skeleton.family
        assert family.experts is not None
        path, _, self._experts = family.experts.path.rpartition(".")
        self._router = family.routers[0].rpartition(".")[2]
        self._grouped = job.cut.groups > 1
        self.module = block.get_submodule(path)
        self._numbers = torch.arange(job.cut.experts)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """x (tokens, hidden) -> (tokens, hidden)."""
        return cast(Tensor, self.module(x.unsqueeze(0))).squeeze(0)

    def routed(self, x: Tensor) -> Tensor:
        """The numbers of the experts that each token goes to: (tokens, k)."""
        seen: list[Tensor] = []
        entry = cast(Experts, self.module.get_submodule(self._experts)).entry
        handle = entry.register_forward_pre_hook(cast(Callable[..., Any], lambda _, given: seen.append(given[0])))
        try:
            self(x)
        finally:
            handle.remove()
        return self._numbers[seen[0]]

    def without(self, gone: Tensor) -> _Mixture:
        """The same with these experts, (experts,) bool, left out, of the whole mixture."""
        fewer = copy.copy(self)
        fewer.module = _shallow(self.module)
        router = _shallow(self.module.get_submodule(self._router))
        fewer.module._modules[self._router] = router
        if self._grouped:  # groups are of one size: the router cannot choose what is left out
            bias = router.get_buffer("e_score_correction_bias")
            router._buffers["e_score_correction_bias"] = bias.masked_fill(gone, -torch.inf)
            return fewer
        fewer._numbers = (~gone).nonzero()[:, 0]
        whole = cast(Experts, self.module.get_submodule(self._experts))
        fewer.module._modules[self._experts] = Experts(whole[number] for number in fewer._numbers.tolist())
        keep_rows(router, fewer._numbers, len(gone))
        return fewer


def _shallow(module: nn.Module) -> nn.Module:
    """A copy with tables of its own for parameters, buffers and parts, which are those of the module."""
    found = copy.copy(module)
    for table in ("_parameters", "_buffers", "_modules"):
        setattr(found, table, dict(getattr(module, table)))
    return found

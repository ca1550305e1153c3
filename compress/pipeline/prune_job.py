"""A pruning made concrete: every linear with its sparsity, and what forbids the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compress.errors import UserError
from compress.models.skeleton import LinearSpec, Skeleton
from compress.pipeline.work import Problem, Work, ignored
from compress.pruning.configs import SparseGptConfig, from_model
from compress.stages import PruneStage
from compress.types import Sparsity

SHARES = "sparsity"
"""Of `decided`: the sparsity of each block, by its number as text."""


@dataclass(frozen=True, kw_only=True)
class PruneJob(Work):
    """Everything a plan or a run needs that sets weights to zero."""

    stage: PruneStage
    sparsities: dict[str, Sparsity]
    """Sparsity of every linear that will be pruned, by checkpoint name."""

    @property
    def sparsity(self) -> Sparsity:
        return self.stage.to_sparsity()

    def sparsity_of(self, spec: LinearSpec) -> Sparsity:
        """What this linear is pruned to; only once that is decided, where blocks differ."""
        shares = self.decided.get(SHARES)
        return self.sparsities[spec.name] if shares is None else Sparsity(shares[str(spec.block)])

    @property
    def label(self) -> str:
        shared = "" if self.stage.allocation == "uniform" else f"-{self.stage.allocation}"
        return self.sparsity.label + shared

    @property
    def needs_blocks(self) -> bool:
        return self.stage.method.calibrated and not self.reads_statistics

    @property
    def needs_original(self) -> bool:
        method = self.stage.method
        return isinstance(method, SparseGptConfig) and method.correction > 0 and not from_model(method)

    @property
    def reads_statistics(self) -> bool:
        """Whether what linears read is kept in a directory, so that no block has to be run."""
        return from_model(self.stage.method) and self.stage.stats is not None


def assign(stage: PruneStage, skeleton: Skeleton) -> tuple[dict[str, Sparsity], dict[str, str], list[Problem]]:
    """The sparsity of every linear that gets one, the reason of every other, and what forbids the run."""
    sparsity, specs = stage.to_sparsity(), skeleton.linears()
    if not specs:
        raise UserError("the model has no linear in any decoder block", "check num_hidden_layers in its config.json")
    reasons, problems = ignored(stage.ignore, specs)
    wanted = [spec for spec in specs if spec.name not in reasons]
    problems += pattern_misfits(sparsity, wanted)
    if not wanted:
        problems.append(Problem("every linear is ignored: nothing is left to prune", "ignore fewer linears"))
    return {spec.name: sparsity for spec in wanted}, reasons, problems


def pattern_misfits(sparsity: Sparsity, wanted: Sequence[LinearSpec]) -> list[Problem]:
    """One problem for every width that the pattern does not divide."""
    misfits = [spec for spec in wanted if not sparsity.fits(spec.in_features)]
    problems = []
    for width in sorted({spec.in_features for spec in misfits}):
        names = [spec.name for spec in misfits if spec.in_features == width]
        others = f" and {len(names) - 1} others" if len(names) > 1 else ""
        said = f"the pattern {sparsity.name} does not divide the width {width} of {names[0]}{others}"
        hint = f"use sparsity {sparsity.share:g}, or leave those linears out with --ignore"
        problems.append(Problem(said, hint))
    return problems

"""What linears that engines load as one matrix share of their quantisation: the largest magnitude that is covered."""

from __future__ import annotations

from collections.abc import Sequence

from compress.models.skeleton import LinearSpec
from compress.pipeline.block import OpenBlock
from compress.pipeline.job import Job
from compress.pipeline.source import read_weight


def shared_ranges(
    job: Job, specs: Sequence[LinearSpec], block: int, opened: OpenBlock | None = None
) -> dict[str, float]:
    """Where a number of the scheme covers a whole matrix, the largest magnitude of each linear and of its fusion group.

    opened: the block as a method before left it; None: as the source has it.
    """
    found: dict[str, float] = {}
    for spec in specs:
        if job.schemes[spec.name].spans_matrix:
            weight = read_weight(job.checkpoint, spec) if opened is None else opened.weight(job, spec)
            found[spec.name] = float(weight.abs().amax())
    for group in job.skeleton.fusion_groups(block):
        members = [name for name in group if name in found]
        found |= dict.fromkeys(members, max((found[name] for name in members), default=0.0))
    return found

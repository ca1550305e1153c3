"""What every linear reads in the model before any of it is pruned, for masks and width cuts that go by that alone.

None of it depends on how much goes or by which method, so `--stats` keeps it, block by block, and another amount or
method reads it without a forward pass. Without `--stats` it is measured in the loop over blocks, and forgotten.

    moments.N (in, in), means.N (in,), tokens.N ()    of the N-th input of a block: mean x x^T, mean x, how many tokens
    of.NAME ()                         which input a linear reads; a linear that no token reached has none
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing

import torch
from torch import Tensor

from compress.calibration.staged import StagedForward
from compress.calibration.statistics import LinearStats, collect, mean_of
from compress.errors import WorkError
from compress.models.skeleton import LinearSpec
from compress.pipeline import inputs, shards, stats_cache
from compress.pipeline.block import Workers, stages
from compress.pipeline.cut_job import CutJob
from compress.pipeline.inputs import Activations
from compress.pipeline.prune_job import PruneJob
from compress.progress import NullProgress, Progress

WHAT = "moments"
AnyJob = PruneJob | CutJob


def complete(job: AnyJob, workers: Workers, progress: Progress) -> None:
    """Measures what is not kept yet, where the stage has a directory for it.

    Raises UserError where another process is writing the same, WorkError where it cannot be written.
    """
    path = stats_cache.place(job, WHAT, {})
    if path is None:
        return
    assert job.calibration is not None
    there, made, at = path.is_dir(), [], inputs.enter(job.skeleton, job.calibration.tokens, False)
    blocks = job.skeleton.num_blocks
    progress.begin("measuring what linears read", blocks)

    def make(block: int) -> dict[str, Tensor]:
        nonlocal at
        made.append(block)
        while at.block < block:  # kept already, but what follows is measured behind it
            _, at = measured(job, at.block, at, workers)
        found, at = measured(job, block, at, workers)
        progress.advance(f"block {block}: measured")
        return found

    shards.complete(path, blocks, make, NullProgress(), WHAT)
    progress.end()
    if there and made:
        progress.warn(f"the statistics in {path} were damaged or unfinished: measured anew from block {made[0]}")


def there(job: AnyJob) -> bool:
    """Whether nothing would have to be measured."""
    return stats_cache.there(job, WHAT, {}, job.skeleton.num_blocks)


def kept(job: AnyJob, block: int) -> dict[str, Tensor]:
    """What is kept of a block. Raises WorkError where it went since it was measured."""
    path = stats_cache.place(job, WHAT, {})
    assert path is not None
    if not path.is_dir():
        raise WorkError(f"the statistics in {path} are gone", "run again with --restart, which measures them anew")
    return shards.read(path, block)


def measured(job: AnyJob, block: int, entering: Activations, workers: Workers) -> tuple[dict[str, Tensor], Activations]:
    """What is to be kept of a block of the model as it was, and what leaves it."""
    module = job.skeleton.materialise(block)
    live = job.skeleton.modules(block, module)
    watched = {spec.name: live[spec.name] for spec in job.skeleton.linears(block)}
    forward = StagedForward(entering.runs(job.skeleton, module), watched, workers.count)
    found: dict[str, Tensor] = {}
    count = 0
    with closing(stages(forward)) as reached:
        for stage in reached:
            if not stage.same_input:
                stats = collect(stage.inputs, {}, workers.pool)
                found |= {f"moments.{count}": stats.hessian, f"means.{count}": mean_of(stage.inputs)}
                found[f"tokens.{count}"] = torch.tensor(stats.tokens)
                count += 1
            found[f"of.{stage.name}"] = torch.tensor(count - 1)
    return found, entering.advanced(forward.outputs)


def by_input(
    found: Mapping[str, Tensor], specs: Sequence[LinearSpec]
) -> tuple[list[tuple[LinearStats, list[LinearSpec]]], list[LinearSpec]]:
    """The linears that read one input together, each set with its statistics; and those that no token reached."""
    groups: dict[int, list[LinearSpec]] = {}
    unseen = []
    for spec in specs:
        number = found.get(f"of.{spec.name}")
        if number is None:
            unseen.append(spec)
        else:
            groups.setdefault(int(number), []).append(spec)
    reading = [
        (LinearStats(found[f"moments.{number}"], None, int(found[f"tokens.{number}"])), members)
        for number, members in sorted(groups.items())
    ]
    return reading, unseen


def of_linear(found: Mapping[str, Tensor], spec: LinearSpec) -> tuple[LinearStats, Tensor]:
    """The statistics of what one linear reads, which some token must reach, and its mean (in,)."""
    number = int(found[f"of.{spec.name}"])
    stats = LinearStats(found[f"moments.{number}"], None, int(found[f"tokens.{number}"]))
    return stats, found[f"means.{number}"]


class Original:
    """What the linears of block after block read in the model as it was: kept, or measured as the loop goes on."""

    def __init__(self, job: AnyJob) -> None:
        self._job = job
        self._at: Activations | None = None

    def of(self, block: int, workers: Workers) -> dict[str, Tensor]:
        """As `measured` finds it; a run that goes on behind blocks done before runs these again."""
        job = self._job
        if job.stage.stats is not None:
            return kept(job, block)
        assert job.calibration is not None
        at = self._at
        if at is None or at.block > block:
            at = inputs.enter(job.skeleton, job.calibration.tokens, False)
        while at.block < block:
            runs = at.runs(job.skeleton, job.skeleton.materialise(at.block))
            at = at.advanced(list(workers.pool.map(lambda run: run(), runs)))
        found, self._at = measured(job, block, at, workers)
        return found

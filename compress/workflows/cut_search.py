"""From a target to the `keep` of a cut: counted for parameters and bytes, measured on this machine for a speed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from compress.artifact.publish import DEFAULT_SHARD_BYTES
from compress.artifact.tensorfile import encode_header
from compress.errors import UserError
from compress.evaluation.costs.timing import in_turns, median_interval, round_ratios
from compress.evaluation.costs.workload import WARM_UP
from compress.evaluation.costs.workload import plan as work_for
from compress.formats.safetensors_header import TORCH_NAMES
from compress.pipeline.cut_job import CutJob
from compress.pipeline.cut_sketch import write_sketch
from compress.pipeline.resolve import STRUCTURED, resolve
from compress.progress import NullProgress, Progress
from compress.recipe import Recipe
from compress.runtime.loading import load
from compress.runtime.protocol import Generation, Runtime
from compress.workflows.cut_target import CutTarget

_NAMES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}
STEPS = 100
"""Speeds are tried at this many steps of `keep`."""


@dataclass(frozen=True, slots=True)
class Speedup:
    """How many times as fast as the source a shape is: the median over rounds, and its interval."""

    keep: float
    estimate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Aimed:
    """The recipe whose cut reaches a target, the parameters that it leaves, and the speeds that were measured."""

    recipe: Recipe
    keep: float
    parameters: int
    all_parameters: int
    tried: tuple[Speedup, ...] = ()

    @property
    def speedup(self) -> Speedup | None:
        """What was measured of the shape that was chosen."""
        return next((each for each in self.tried if each.keep == self.keep), None)


def aim(
    recipe: Recipe,
    target: CutTarget,
    *,
    model: str | Path | None = None,
    output: str | Path | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Aimed:
    """The recipe, of one stage that cuts, with the largest `keep` that reaches the target.

    A speed is measured on models of the shape that each `keep` would leave, by the runtime, in turns with the source.

    Raises:
        UserError: a method that cuts nothing, a target that the model meets as it is or that no cut of it meets.
        WorkError, IntegrityError: as `pipeline.run` and `runtime.load` do.
    """

    opened = resolve(recipe, model=model, output=output, device=device)
    if not isinstance(opened, CutJob):
        raise UserError(f"{target.option} is for cuts, not for {opened.method_name}", "use width, depth or experts")
    assign = STRUCTURED[type(opened.stage.method)][1]

    def job(keep: float) -> CutJob:
        stage = opened.stage.model_copy(update={"keep": keep})
        cut, problems = assign(stage, opened.skeleton)
        found: CutJob = replace(cast(Any, opened), stage=stage, cut=cut, problems=problems)
        return found

    whole: Any = job(0.5)
    total = whole.cut.all_parameters
    tried: list[Speedup] = []
    if target.kind == "speedup":
        keep = _fast_enough(job, target, tried, progress or NullProgress())
    else:
        allowed = math.floor(target.value) if target.kind == "params" else _room(whole, int(target.value))
        if allowed >= total:
            raise UserError(
                f"{target.option} {target.value:.0f} is what the model has already: {total} parameters",
                "ask for less than it has",
            )
        if allowed <= 0:
            raise UserError(f"{target.option} {target.value:.0f} leaves no parameter", "ask for more")
        keep = allowed / total
        keep = keep if math.floor(keep * total) >= allowed else math.nextafter(keep, 1.0)
        keep = _short(job, keep)
    chosen: Any = job(keep)
    chosen.refuse_problems()
    return Aimed(_with(recipe, keep), keep, chosen.cut.parameters, total, tuple(tried))


def _with(recipe: Recipe, keep: float) -> Recipe:
    (stage,) = recipe.stages
    return recipe.model_copy(update={"stages": [stage.model_copy(update={"keep": keep})]})


def _short(job: Any, keep: float) -> float:
    """The shortest decimal that leaves as much as `keep`."""
    wanted = job(keep).cut.parameters
    return next((s for d in range(2, 12) if (s := round(keep, d)) > 0 and job(s).cut.parameters == wanted), keep)


def _room(job: Any, size: int) -> int:
    """How many parameters fit into weight files of `size` bytes, whose headers are at most as long as they would be."""
    index, copies = job.checkpoint.index, job.skeleton.stored_copies()
    left = {name: info for name, info in index.items() if name not in copies}
    rows = [
        (name, _NAMES[str(info.dtype).removeprefix("torch.")], tuple(info.shape), info.nbytes)
        for name, info in left.items()
    ]
    stored = sum(info.nbytes for info in left.values())
    header = len(encode_header(rows)) + 128 * (stored // DEFAULT_SHARD_BYTES)
    itemsize = index[job.skeleton.linears(0)[0].weight].dtype.itemsize
    return int(job.cut.all_parameters - math.ceil((stored + header - size) / itemsize))


def _fast_enough(job: Any, target: CutTarget, tried: list[Speedup], progress: Progress) -> float:
    """The largest `keep` whose shape is fast enough, by bisection; what was measured is appended to `tried`."""
    shapes = {
        job(step / STEPS).cut.parameters: step for step in range(STEPS - 1, 0, -1) if not job(step / STEPS).problems
    }
    possible = sorted(shapes.values())
    if not possible:
        job(0.5).refuse_problems()
        raise UserError("nothing of this model can be cut with these settings", "change the settings of the method")
    source = load(job(0.5).checkpoint.path)
    progress.begin(f"measuring {target.speed} speed of shapes", 2 + math.ceil(math.log2(len(possible))))

    def reaches(step: int) -> bool:
        found = measured(job(step / STEPS), source, target)
        tried.append(Speedup(step / STEPS, *found))
        progress.advance(f"keep {step / STEPS:g}: {found[0]:.2f} times as fast")
        return found[0] >= target.value

    slow, fast = len(possible), 0
    if not reaches(possible[0]):
        raise UserError(
            f"no cut of this kind is {target.value:g} times as fast here: keep {possible[0] / STEPS:g} is "
            f"{tried[-1].estimate:.2f} times",
            "ask for less, or cut in depth, which costs no engine anything per block that is gone",
        )
    while slow - fast > 1:
        middle = (slow + fast) // 2
        if reaches(possible[middle]):
            fast = middle
        else:
            slow = middle
    progress.end()
    return possible[fast] / STEPS


def measured(job: CutJob, source: Runtime, target: CutTarget) -> tuple[float, float, float]:
    """How many times as fast as the source the shape is that a cut will have: median, and its 95% interval.

    One sequence: a prompt of 128 tokens is read, and 32 tokens are decoded, or what a short context has room for.
    """
    with TemporaryDirectory(prefix="compress-shape-") as place:
        write_sketch(job, Path(place))
        candidate = load(place)
        works = [work_for(runtime, batch_sizes=(1,)) for runtime in (candidate, source)]
        pair = zip((candidate, source), works, strict=True)
        runs = [partial(_answer, runtime, work.prompt, work.sampling) for runtime, work in pair]
        mine, theirs = in_turns(runs, works[0].repeats, WARM_UP)
    seconds = [[getattr(answer, f"{target.speed}_seconds") for answer in each] for each in (mine, theirs)]
    found = median_interval(round_ratios(*seconds))
    return found.estimate, found.low, found.high


def _answer(runtime: Runtime, prompt: str, sampling: Any) -> Generation:
    (answer,) = runtime.generate([prompt], sampling)
    return answer

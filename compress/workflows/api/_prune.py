"""Pruning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compress.workflows.api._given import PathLike, let_through

if TYPE_CHECKING:
    from compress.artifact.reader import Artifact
    from compress.progress import Progress


def prune(
    model: PathLike | None = None,
    method: str | None = None,
    sparsity: float | None = None,
    *,
    pattern: str | None = None,
    keep: float | None = None,
    target_params: str | int | None = None,
    target_size: str | int | None = None,
    target_speedup: float | None = None,
    speed_of: str | None = None,
    repair: bool | None = None,
    allocation: str | None = None,
    format: str | None = None,
    stats: str | None = None,
    ignore: Sequence[str] = (),
    recipe: PathLike | None = None,
    calib: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int | None = None,
    output: PathLike | None = None,
    device: str = "auto",
    restart: bool = False,
    evaluate: bool = True,
    eval_tokens: int | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Remove weights, with `width`, `depth` or `experts` whole parts of it, and score the result against the model.

    Single weights become zero, and the file stays dense; a model that loses whole parts is really smaller. Killed at
    any moment, the same call resumes and makes the same bytes.

    Args:
        model: Model directory, hub id or artifact; the packaged model if None.
        method: `magnitude`, `wanda`, `ria`, `sparsegpt`, `width`, `depth` or `experts`; default `sparsegpt`,
            with `keep` `width`.
        sparsity: Share of each linear's weights that goes; default 0.5.
        pattern: n:m such as `2:4` in place of `sparsity`: of every m consecutive inputs n stay.
        keep: Of the last three: share of all parameters that stays, embeddings counted; the nearest possible
            below is made.
        target_params: In place of `keep`: at most so many parameters, a number or `4M`.
        target_size: In place of `keep`: weight files of at most so many bytes, a number or `9MB`.
        target_speedup: In place of `keep`, of `width` and `depth`: so many times as fast as the model, measured here.
        speed_of: What that measures, `decode` (the default) or `prefill`, of one sequence.
        repair: Of `width`: whether the linears that lose inputs are repaired; default True.
        allocation: How blocks share a `sparsity`: `uniform` (the default), `owl` or `alphapruning`.
        format: `dense` (the default) or `sparse-bitmask`, smaller on disk, which `compress.load` reads.
        stats: A directory where what a cut measures of the whole model is kept, and read for other amounts.
        ignore: Names or patterns of linears to leave as they are.
        recipe: A recipe file to start from; the settings above override it.
        calib, samples, seq_len, seed, output, device, restart, evaluate, eval_tokens, progress: As for `quantize`;
            output defaults to `artifacts/<model>-<method>-<sparsity>/vN`.

    Returns:
        The finished artifact.

    Raises:
        UserError, WorkError, IntegrityError: as `quantize`.
    """
    from compress.recipe_prune import UNDECIDED, PruneSettings, build_prune_recipe
    from compress.workflows import quantize as workflow
    from compress.workflows.cut_target import parse_cut_target

    target = parse_cut_target(target_params, target_size, target_speedup, speed=speed_of, keep=keep)
    settings = PruneSettings(
        method=method,
        sparsity=sparsity,
        pattern=pattern,
        keep=keep if target is None else UNDECIDED,
        repair=repair,
        allocation=allocation,
        format=format,
        stats=stats,
        ignore=ignore,
        calib=calib,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
    )
    wanted = build_prune_recipe(settings, base=recipe)[0]
    if target is not None:
        from compress.workflows.cut_search import aim

        wanted = aim(wanted, target, model=model, output=output, device=device, progress=progress).recipe
    made = workflow.quantize(
        wanted,
        model=model,
        output=output,
        device=device,
        restart=restart,
        evaluate=evaluate,
        eval_tokens=eval_tokens,
        progress=progress,
    )
    return let_through(made)

"""Quantising."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compress.recipe_build import Settings
from compress.workflows.api._given import PathLike, let_through, whole_recipe

if TYPE_CHECKING:
    from compress.artifact.reader import Artifact
    from compress.progress import Progress
    from compress.recipe import Recipe


def quantize(
    model: PathLike | None = None,
    method: str | None = None,
    bits: int | None = None,
    *,
    group_size: int | str | None = None,
    symmetric: bool | None = None,
    scheme: str | None = None,
    kv_cache: str | None = None,
    ignore: Sequence[str] = (),
    embeddings: str | None = None,
    head: str | None = None,
    refine: bool | None = None,
    format: str | None = None,
    target_bits: float | None = None,
    target_file_bits: float | None = None,
    target_size: str | None = None,
    max_kl: float | None = None,
    recipe: Recipe | PathLike | None = None,
    calib: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    experts: str | None = None,
    redrawn: int | None = None,
    seed: int | None = None,
    output: PathLike | None = None,
    device: str = "auto",
    restart: bool = False,
    evaluate: bool = True,
    eval_tokens: int | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Quantise the linears of a model's decoder blocks and score the result against the model.

    Killed at any moment, the same call resumes and makes the same bytes.

    Args:
        model: Model directory, hub id or artifact; the packaged model if None.
        method: A method that `compress methods` lists; default `awq`, or what suits `scheme`.
        bits: Bits per weight code, 2 to 8; default 4.
        group_size: Inputs that share a scale (a divisor of every linear's input width), or `channel`; default 128.
        symmetric: Whether zero points are absent; default True.
        scheme: A layout by name, such as `W4A16`, `W8A8` or `FP8_DYNAMIC`, in place of `bits`.
        kv_cache: `fp8` stores calibrated scales of an FP8 key and value cache, with schemes that round inputs.
        ignore: Names or patterns of linears to leave as they are.
        embeddings, head: Layouts of the token embedding and of the output projection, such as `W6A16-g64`; 16 bits if
            None, `auto` for what a budget chooses. Of a model that ties the two, either one stands for both.
        refine: Whether scales and norms are tuned afterwards on the KL to the original, with the whole model in memory;
            default False.
        format: `compressed-tensors` (the default), `awq`, `gptq`, `gptq-v2` or `modelopt`.
        target_bits, target_file_bits, target_size, max_kl: Mix schemes by measurement, in place of `bits` and `scheme`:
            within so many stored bits per weight of what they are chosen for, or of the whole model, within a size of
            the weight files such as `3.2GiB`, or the fewest bits of at most so much KL; `method` is then `gptq` if
            None, and `group_size` the only one to choose from.
        recipe: A Recipe or a recipe file to start from; the settings above override a file, and exclude a Recipe.
        calib: A packaged text, a text, JSONL, JSON or Parquet file, a hub data set, or a mix `a:0.5,b:0.5`; default
            `tales`.
        samples: Calibration windows; default 128.
        seq_len: Tokens per window; default 512.
        experts: `routed` (the default) or `all`: whether experts learn from the tokens that the router sends them, or
            from all tokens.
        redrawn: So many copies of every calibration window are read besides, with a share of their tokens drawn anew by
            the model itself; default 0.
        seed: Seed of the run; default 0.
        output: The artifact directory; default `artifacts/<model>-<method>-<scheme>/vN`, the next N.
        device: `auto` or `cpu`; the block loop runs on the CPU only for now.
        restart: Start over, and replace what `output` holds once the new artifact is complete.
        evaluate: Whether to score the artifact against its source by the suite `smoke` and attach the scores.
        eval_tokens: Held-out tokens to score, in place of the suite's 16,384.
        progress: Where to report; nowhere if None.

    Returns:
        The finished artifact; `.path` is its directory, `.eval()` its scores, `.layers()` the report per linear.

    Raises:
        UserError: bad settings, model, calibration text or output.
        WorkError: NaN in weights, out of memory, disk full.
        IntegrityError: damaged source files.
    """
    from compress.workflows import quantize as workflow
    from compress.workflows.budget.target import METHOD, chosen_group_sizes, chosen_tables, parse_target

    target = parse_target(
        target_bits, target_size, max_kl, chosen={"bits": bits, "scheme": scheme}, file_bits=target_file_bits
    )
    measured = chosen_tables(embeddings, head, target)
    settings = Settings(
        method=METHOD if target is not None and method is None and recipe is None else method,
        bits=bits,
        group_size=None if target is not None else group_size,
        symmetric=symmetric,
        scheme=scheme,
        kv_cache=kv_cache,
        ignore=ignore,
        embeddings=embeddings,
        head=head,
        refine=refine,
        format=format,
        calib=calib,
        samples=samples,
        seq_len=seq_len,
        experts=experts,
        redrawn=redrawn,
        seed=seed,
    )
    if target is not None:
        from compress.workflows.budget.search import quantize_to_budget

        return quantize_to_budget(
            whole_recipe(recipe, settings),
            target,
            model=model,
            group_sizes=chosen_group_sizes(group_size),
            chosen_tables=measured,
            output=None if output is None else Path(output),
            device=device,
            restart=restart,
            evaluate=evaluate,
            eval_tokens=eval_tokens,
            progress=progress,
        ).made.artifact
    made = workflow.quantize(
        whole_recipe(recipe, settings),
        model=model,
        output=output,
        device=device,
        restart=restart,
        evaluate=evaluate,
        eval_tokens=eval_tokens,
        progress=progress,
    )
    return let_through(made)

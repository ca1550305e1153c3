"""The Python API: the verbs of the command line as functions. Everything heavy is imported on call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compress.recipe_build import Settings, build_recipe

if TYPE_CHECKING:
    from compress.artifact.reader import Artifact
    from compress.evaluation.policy import Policy
    from compress.evaluation.records import EvalRecord
    from compress.evaluation.verdict import Verdict
    from compress.pipeline import AnyPlan
    from compress.progress import Progress
    from compress.recipe import Recipe
    from compress.runtime.protocol import Runtime

PathLike = str | Path


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
    refine: bool | None = None,
    format: str | None = None,
    target_bits: float | None = None,
    target_size: str | None = None,
    max_kl: float | None = None,
    recipe: Recipe | PathLike | None = None,
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
    """Quantise the linears of a model's decoder blocks and score the result against the model.

    Killed at any moment, the same call resumes and makes the same bytes.

    Args:
        model: Model directory, hub id or artifact; the packaged model if None.
        method: `rtn`, `gptq` or `awq` (the default).
        bits: Bits per weight code, 2 to 8; default 4.
        group_size: Inputs that share a scale (a divisor of every linear's input width), or `channel`; default 128.
        symmetric: Whether zero points are absent; default True.
        scheme: A layout by name, such as `W4A16`, `W8A8` or `FP8_DYNAMIC`, in place of `bits`.
        kv_cache: `fp8` stores calibrated scales of an FP8 key and value cache, with schemes that round inputs.
        ignore: Names or patterns of linears to leave as they are.
        refine: Whether scales and norms are tuned afterwards on the KL to the original, with the whole model in memory;
            default False.
        format: `compressed-tensors` (the default), `awq`, `gptq`, `gptq-v2` or `modelopt`.
        target_bits, target_size, max_kl: Mix schemes by measurement, in place of `bits` and `scheme`: within so many
            stored bits per weight, within a size of the weight files such as `3.2GiB`, or the fewest bits of at most
            so much KL; `method` is then `gptq` if None, and `group_size` the only one to choose from.
        recipe: A Recipe or a recipe file to start from; the settings above override a file, and exclude a Recipe.
        calib: A packaged text, a text, JSONL, JSON or Parquet file, a hub data set, or a mix `a:0.5,b:0.5`; default
            `tales`.
        samples: Calibration windows; default 128.
        seq_len: Tokens per window; default 512.
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
    from compress.workflows.budget.target import METHOD, chosen_group_sizes, parse_target

    target = parse_target(target_bits, target_size, max_kl, chosen={"bits": bits, "scheme": scheme})
    settings = Settings(
        method=METHOD if target is not None and method is None and recipe is None else method,
        bits=bits,
        group_size=None if target is not None else group_size,
        symmetric=symmetric,
        scheme=scheme,
        kv_cache=kv_cache,
        ignore=ignore,
        refine=refine,
        format=format,
        calib=calib,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
    )
    if target is not None:
        from compress.workflows.budget.search import quantize_to_budget

        return quantize_to_budget(
            _recipe(recipe, settings),
            target,
            model=model,
            group_sizes=chosen_group_sizes(group_size),
            output=None if output is None else Path(output),
            device=device,
            restart=restart,
            evaluate=evaluate,
            eval_tokens=eval_tokens,
            progress=progress,
        ).made.artifact
    return workflow.quantize(
        _recipe(recipe, settings),
        model=model,
        output=output,
        device=device,
        restart=restart,
        evaluate=evaluate,
        eval_tokens=eval_tokens,
        progress=progress,
    ).artifact


def prune(
    model: PathLike | None = None,
    method: str | None = None,
    sparsity: float | None = None,
    *,
    pattern: str | None = None,
    keep: float | None = None,
    repair: bool | None = None,
    allocation: str | None = None,
    format: str | None = None,
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
        repair: Of `width`: whether the linears that lose inputs are repaired; default True.
        allocation: How blocks share a `sparsity`: `uniform` (the default), `owl` or `alphapruning`.
        format: `dense` (the default) or `sparse-bitmask`, smaller on disk, which `compress.load` reads.
        ignore: Names or patterns of linears to leave as they are.
        recipe: A recipe file to start from; the settings above override it.
        calib, samples, seq_len, seed, output, device, restart, evaluate, eval_tokens, progress: As for `quantize`;
            output defaults to `artifacts/<model>-<method>-<sparsity>/vN`.

    Returns:
        The finished artifact.

    Raises:
        UserError, WorkError, IntegrityError: as `quantize`.
    """
    from compress.recipe_prune import PruneSettings, build_prune_recipe
    from compress.workflows import quantize as workflow

    settings = PruneSettings(
        method=method,
        sparsity=sparsity,
        pattern=pattern,
        keep=keep,
        repair=repair,
        allocation=allocation,
        format=format,
        ignore=ignore,
        calib=calib,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
    )
    return workflow.quantize(
        build_prune_recipe(settings, base=recipe)[0],
        model=model,
        output=output,
        device=device,
        restart=restart,
        evaluate=evaluate,
        eval_tokens=eval_tokens,
        progress=progress,
    ).artifact


def distill(
    student: PathLike,
    teacher: PathLike | None = None,
    *,
    loss: str | None = None,
    temperature: float | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    lora_rank: int | None = None,
    full: bool = False,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    teacher_cache: PathLike | None = None,
    recipe: PathLike | None = None,
    data: str | None = None,
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
    """Train a smaller or pruned model to answer as its teacher does, and score it against the teacher.

    Zeros of a pruned student stay zero. Killed at any moment, the same call resumes and makes the same bytes.

    Args:
        student: Model directory, hub id or artifact that learns.
        teacher: What it learns from; the packaged model if None.
        loss: `forward-kl` (the default), `reverse-kl`, `jsd`, `skew-kl`, `topk-kl` or `ce`.
        temperature: Flattens both distributions; default 1.
        minutes: How long to train, measured in steps at the start; default 8.
        steps: How many steps, in place of `minutes`.
        lora_rank: Rank of the adapters that learn and are merged; default 16.
        full: Whether all weights learn, in place of adapters.
        learning_rate: Default 6e-3 for adapters, 1e-3 for all weights; in models wider than 256, less in proportion.
        batch_size: Windows per step; default 8.
        teacher_cache: Directory where the teacher's top tokens are kept, to learn from by `topk-kl`.
        recipe: A recipe file to start from; the settings above override it.
        data: Name of a packaged text or path of a UTF-8 file to learn on; default `tales`.
        samples: Windows of it, held-out ones too; default all.
        seq_len: Tokens per window; default 256.
        seed: Seed of the run; default 0.
        output: The artifact directory; default `artifacts/<student>-<loss>-<lora16|full>/vN`, the next N.
        device: `auto` or `cpu`.
        restart: Start over, and replace what `output` holds once the new artifact is complete.
        evaluate: Whether to score the artifact against the teacher by the suite `smoke` and attach the scores.
        eval_tokens: Held-out tokens to score, in place of the suite's 16,384.
        progress: Where to report; nowhere if None.

    Returns:
        The finished artifact; `.training()` tells how it learned.

    Raises:
        UserError: bad settings, models, text or output; peft is missing.
        WorkError: the loss is not finite, out of memory, disk full.
        IntegrityError: damaged files, or two models that read a text into different tokens.
    """
    from compress.recipe_distill import DistillSettings, build_distill_recipe
    from compress.workflows import quantize as workflow

    settings = DistillSettings(
        teacher=None if teacher is None else str(teacher),
        student=str(student),
        loss=loss,
        temperature=temperature,
        minutes=minutes,
        steps=steps,
        lora_rank=lora_rank,
        full=full,
        learning_rate=learning_rate,
        batch_size=batch_size,
        cache=None if teacher_cache is None else str(Path(teacher_cache).resolve()),
        data=data,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
    )
    return workflow.quantize(
        build_distill_recipe(settings, base=recipe),
        output=output,
        device=device,
        restart=restart,
        evaluate=evaluate,
        eval_tokens=eval_tokens,
        progress=progress,
    ).artifact


def plan(
    model: PathLike | None = None,
    method: str | None = None,
    bits: int | None = None,
    *,
    recipe: Recipe | PathLike | None = None,
    group_size: int | str | None = None,
    symmetric: bool | None = None,
    scheme: str | None = None,
    kv_cache: str | None = None,
    ignore: Sequence[str] = (),
    samples: int | None = None,
    seq_len: int | None = None,
    output: PathLike | None = None,
    device: str = "auto",
) -> AnyPlan:
    """What `quantize` with the same arguments would make and cost; of a recipe that prunes, what that would.

    Writes nothing.

    Returns:
        The scheme and bits per weight of every linear, bytes of the output, peak memory in bytes, seconds; `problems`
        holds what would make the run fail, such as a group size that does not divide a linear's input width.

    Raises:
        UserError, IntegrityError: as `quantize`.
    """
    from compress import pipeline

    settings = Settings(
        method=method,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        scheme=scheme,
        kv_cache=kv_cache,
        ignore=ignore,
        samples=samples,
        seq_len=seq_len,
    )
    return pipeline.plan(_recipe(recipe, settings), model=model, output=output, device=device, scored=True)


def load(
    model: PathLike | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    kernel: str = "auto",
    kv_cache: str = "auto",
) -> Runtime:
    """Load a model directory, hub id or artifact for scoring and generation; the packaged model if None.

    Args:
        model: What to load.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: Compute dtype: `auto`, `float32`, `bfloat16` or `float16`.
        kernel: `auto`, `cpu`, `cpu-int8` or `reference`, as `compress.runtime.loading.load` says.
        kv_cache: `auto`, `float32`, `bfloat16`, `int8` or `int4`: how the native engine keeps keys and values.

    Returns:
        A runtime: `.score(token_ids)` gives logits, `.generate(prompts, SamplingParams(...))` texts.

    Raises:
        UserError: no model there, an unknown architecture, device, dtype or kernel.
        IntegrityError: damaged files; an artifact is hashed whole first.
        WorkError: out of memory.
    """
    from compress.runtime.loading import load as load_runtime
    from compress.runtime.sound import check_artifact

    found = _model(model)
    check_artifact(found, scores=False)
    return load_runtime(found, device=device, dtype=dtype, kernel=kernel, kv_cache=kv_cache)


def evaluate(
    model: PathLike | None = None,
    baseline: PathLike | None = None,
    *,
    suite: PathLike | None = None,
    data: PathLike | None = None,
    tasks: Sequence[str] = (),
    max_tokens: int | None = None,
    seq_len: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    cost: bool = False,
    cache_dir: PathLike | None = None,
    trust_code: bool = False,
    progress: Progress | None = None,
) -> EvalRecord:
    """Score a model or artifact: perplexity, tasks, and with a `baseline` KL, agreement and what flipped.

    Args:
        model: Model directory, hub id or artifact; the packaged model if None.
        baseline: What to compare with, on the same tokens.
        suite: `smoke`, `pr`, `nightly`, `release` or a suite file; default the packaged held-out text alone.
        data: Name of a text or path of a UTF-8 or JSONL file, in place of the suite's texts.
        tasks: Tasks besides the suite's, by name (`blimp:500` for 500 items) or file.
        max_tokens: At most so many tokens of a text, spread evenly over it; default the suite's, else all.
        seq_len: Tokens per window; default 512, or the context where that is shorter.
        device: `auto`, `cpu` or `cuda`.
        dtype: Compute dtype of both; `auto` is float32 on a CPU.
        cost: Whether to measure load time, memory and speed too.
        cache_dir: Where finished answers are kept, so that a killed evaluation goes on; nowhere if None.
        trust_code: Whether to execute the Python scorers and programs that tasks name.
        progress: Where to report; nowhere if None.

    Returns:
        The record: `.text().summary` holds a text's estimates with 95% intervals, `.text().clusters` the sums that
        they follow from, `.tasks` the answers.

    Raises:
        UserError, IntegrityError, WorkError: as `compress.evaluation.evaluate.evaluate`.
    """
    from compress.evaluation.evaluate import evaluate as run

    return run(
        _model(model),
        baseline,
        suite=suite,
        data=data,
        tasks=tasks,
        max_tokens=max_tokens,
        seq_len=seq_len,
        device=device,
        dtype=dtype,
        cost=cost,
        cache_dir=cache_dir,
        trust_code=trust_code,
        progress=progress,
    )


def gate(
    candidate: PathLike,
    baseline: PathLike | Mapping[str, PathLike] | None = None,
    policy: PathLike | Policy | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    cache_dir: PathLike | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Decide whether a candidate may be released: PASS, FAIL or INCONCLUSIVE, each gate with its interval.

    Args:
        candidate: An eval.json, an artifact or a model directory.
        baseline: The same; not needed where the candidate's scores were taken against one. Several as a mapping from
            the names that the policy's gates use, such as `{"root": ..., "last": ...}`.
        policy: A policy file, a packaged one by name, or a Policy; the packaged default if None.
        device: Where to score what has no scores.
        dtype: Compute dtype of that.
        cache_dir: Where finished work is kept, so that a killed run goes on.
        progress: Where to report; nowhere if None.

    Raises:
        UserError, IntegrityError, WorkError: as `compress.evaluation.gate.gate`.
    """
    from compress.evaluation.gate import gate as run

    return run(candidate, baseline, policy, device=device, dtype=dtype, cache_dir=cache_dir, progress=progress)


def _model(model: PathLike | None) -> PathLike:
    from compress.content import default_model

    return default_model() if model is None else model


def _recipe(recipe: Recipe | PathLike | None, settings: Settings) -> Recipe:
    from compress.errors import UserError
    from compress.recipe import Recipe

    if not isinstance(recipe, Recipe):
        return build_recipe(settings, base=recipe)[0]
    if settings != Settings(ignore=settings.ignore) or settings.ignore:
        raise UserError("a Recipe and single settings were both given", "put the settings into the recipe")
    return recipe

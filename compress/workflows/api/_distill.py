"""Distilling."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compress.workflows.api._given import PathLike, let_through

if TYPE_CHECKING:
    from compress.artifact.reader import Artifact
    from compress.progress import Progress


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
    answers: int | None = None,
    seed: int | None = None,
    output: PathLike | None = None,
    device: str = "auto",
    processes: int = 1,
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
        loss: `forward-kl` (the default), `reverse-kl`, `jsd`, `skew-kl`, `topk-kl`, `sampled-kl`, `hidden`,
            `on-policy` or `ce`.
        temperature: Flattens both distributions; default 1.
        minutes: How long to train, measured in steps at the start; default 8.
        steps: How many steps, in place of `minutes`.
        lora_rank: Rank of the adapters that learn and are merged; default 16.
        full: Whether all weights learn, in place of adapters.
        learning_rate: Default 6e-3 for adapters, 1e-3 for all weights; in models wider than 256, less in proportion.
        batch_size: Windows per step; default 8.
        teacher_cache: Directory where a few of the teacher's tokens are kept, for `topk-kl` and `sampled-kl`.
        recipe: A recipe file to start from; the settings above override it.
        data: Name of a packaged text or path of a UTF-8 file to learn on; default `tales`.
        samples: Windows of it, held-out ones too; default all.
        seq_len: Tokens per window; default 256.
        answers: Lines or rows of the text are prompts, and the student learns the teacher's answers of at most so many
            tokens; default None, the text itself is learned on.
        seed: Seed of the run; default 0.
        output: The artifact directory; default `artifacts/<student>-<loss>-<lora16|full>/vN`, the next N.
        device: `auto` or `cpu`.
        processes: How many processes share the batches; the bytes are those of one.
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
    from compress.distillation.processes import shared_by
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
        answers=answers,
        seed=seed,
    )
    with shared_by(processes):
        made = workflow.quantize(
            build_distill_recipe(settings, base=recipe),
            output=output,
            device=device,
            restart=restart,
            evaluate=evaluate,
            eval_tokens=eval_tokens,
            progress=progress,
        )
    return let_through(made)

"""Options of `compress distill`, and of its plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from compress.commands._options import (
    CALIBRATION,
    METHOD,
    BaseRecipe,
    Processes,
    Run,
)
from compress.distillation.configs import LOSS_NAMES
from compress.recipe_distill import DistillSettings


@dataclass(frozen=True, kw_only=True)
class Distill(Run):
    """`compress distill` and `compress plan distill`."""

    student: Annotated[
        str, typer.Option(help="Model directory, hub id or artifact that learns.", metavar="S", show_default=False)
    ]
    teacher: Annotated[
        str | None,
        typer.Option(help="What it learns from; the small packaged model if left out.", metavar="T"),
    ] = None
    loss: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(LOSS_NAMES)}; forward-kl if left out.", metavar="NAME", rich_help_panel=METHOD),
    ] = None
    temperature: Annotated[
        float | None, typer.Option(help="Flattens both distributions; 1 if left out.", rich_help_panel=METHOD)
    ] = None
    lora_rank: Annotated[
        int | None,
        typer.Option(min=1, help="Rank of the adapters that learn; 16 if left out.", rich_help_panel=METHOD),
    ] = None
    full: Annotated[bool, typer.Option("--full", help="Train all weights, not adapters.", rich_help_panel=METHOD)] = (
        False
    )
    minutes: Annotated[float | None, typer.Option(help="How long to train; 8 if left out.", rich_help_panel=METHOD)] = (
        None
    )
    steps: Annotated[
        int | None, typer.Option(min=1, help="How many steps to train, in place of --minutes.", rich_help_panel=METHOD)
    ] = None
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="6e-3 for adapters, 1e-3 for all weights, and less in models wider than 256, if left out.",
            rich_help_panel=METHOD,
        ),
    ] = None
    batch_size: Annotated[
        int | None, typer.Option(min=2, help="Windows per step; 8 if left out.", rich_help_panel=METHOD)
    ] = None
    teacher_cache: Annotated[
        str | None,
        typer.Option(
            help="Keep the teacher's tokens in this directory, to learn by topk-kl (the loss then) or sampled-kl.",
            metavar="DIR",
            rich_help_panel=METHOD,
        ),
    ] = None
    recipe: BaseRecipe = None
    data: Annotated[
        str | None,
        typer.Option(
            help="Packaged text by name, or a UTF-8 text file, to learn on; tales if left out.",
            metavar="NAME|FILE",
            rich_help_panel=CALIBRATION,
        ),
    ] = None
    answers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Lines or rows of the text are prompts; learn the teacher's answers of at most so many tokens.",
            metavar="TOKENS",
            rich_help_panel=CALIBRATION,
        ),
    ] = None
    samples: Annotated[
        int | None,
        typer.Option(help="Windows of it, held-out ones too; all if left out.", rich_help_panel=CALIBRATION),
    ] = None
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens per window; 256 if left out.", rich_help_panel=CALIBRATION)
    ] = None
    processes: Processes = 1

    def settings(self) -> DistillSettings:
        """The flags that decide the recipe."""
        return DistillSettings(
            teacher=self.teacher,
            student=self.student,
            loss=self.loss,
            temperature=self.temperature,
            minutes=self.minutes,
            steps=self.steps,
            lora_rank=self.lora_rank,
            full=self.full,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            cache=self.teacher_cache,
            data=self.data,
            samples=self.samples,
            seq_len=self.seq_len,
            answers=self.answers,
            seed=self.seed,
        )

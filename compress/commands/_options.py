"""Options that several commands share, as dataclasses: the command line is defined once, here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from compress.commands import _debug

MAKE = "Make"
MEASURE = "Use and measure"
LOOK = "Look"
"""Panels of `compress --help`."""

GENERAL = "General"
METHOD = "Method and scheme"
BUDGET = "Budget"
CALIBRATION = "Calibration"
OUTPUT = "Output"
"""Panels of a command's own help."""

MODEL_HELP = "Model directory or hub id; the small packaged model if left out."
MODEL_OR_ARTIFACT_HELP = "Model directory, hub id or artifact; the small packaged model if left out."
DTYPE_HELP = "Compute dtype: auto, float32, bfloat16 or float16."

# Options that several commands have alike.
SourceModel = Annotated[str | None, typer.Argument(help=MODEL_HELP, metavar="MODEL", show_default=False)]
IgnoredLinears = Annotated[
    list[str],
    typer.Option(
        help="Linear to leave as it is, by name or pattern; repeatable.", metavar="NAME", rich_help_panel=METHOD
    ),
]
BaseRecipe = Annotated[
    Path | None,
    typer.Option(help="Recipe to start from, a file or a shipped name.", metavar="FILE", rich_help_panel=METHOD),
]
Processes = Annotated[
    int,
    typer.Option(
        min=1, help="Processes that share a training's batches; the bytes are those of one.", rich_help_panel=GENERAL
    ),
]
ScoringKernel = Annotated[
    str,
    typer.Option(
        help="What computes the scores: cpu, cpu-int8 or triton, the engine's; reference, transformers; auto, the "
        "engine's exact products where it computes both models on a CPU, else reference.",
        metavar="NAME",
        rich_help_panel=GENERAL,
    ),
]
CalibrationText = Annotated[
    str | None,
    typer.Option(
        help="Packaged text, text, JSONL or Parquet file, hub data set org/name, or a mix a:0.5,b:0.5; "
        "tales if left out.",
        metavar="NAME|FILE",
        rich_help_panel=CALIBRATION,
    ),
]
CalibrationSamples = Annotated[
    int | None, typer.Option(help="Calibration windows; 128 if left out.", rich_help_panel=CALIBRATION)
]
CalibrationLength = Annotated[
    int | None, typer.Option(help="Tokens per window; 512 if left out.", rich_help_panel=CALIBRATION)
]


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every command takes."""

    json_mode: Annotated[
        bool, typer.Option("--json", help="Write one JSON document to stdout.", rich_help_panel=GENERAL)
    ] = False
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="No progress, notes or tables; results only.", rich_help_panel=GENERAL),
    ] = False
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            help="Show the traceback of an error.",
            callback=_debug.remember,
            is_eager=True,
            rich_help_panel=GENERAL,
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class Machine(Common):
    """Where the work is done."""

    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", metavar="NAME", rich_help_panel=GENERAL)] = "auto"
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="CPU threads; all cores if left out.", rich_help_panel=GENERAL)
    ] = None


@dataclass(frozen=True, kw_only=True)
class Run(Machine):
    """What every command takes that makes an artifact."""

    device: Annotated[
        str,
        typer.Option(
            help="auto or cpu; compressing runs on the CPU only for now.", metavar="NAME", rich_help_panel=GENERAL
        ),
    ] = "auto"
    output: Annotated[
        Path | None,
        typer.Option(
            help="The artifact directory itself; artifacts/MODEL-METHOD-SCHEME/vN if left out.",
            metavar="DIR",
            rich_help_panel=OUTPUT,
        ),
    ] = None
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the run; 0 if left out.", rich_help_panel=OUTPUT)] = (
        None
    )
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done; write nothing.", rich_help_panel=OUTPUT)
    ] = False
    restart: Annotated[
        bool,
        typer.Option(
            "--restart",
            help="Start over, and replace what --output holds once the new artifact is complete.",
            rich_help_panel=OUTPUT,
        ),
    ] = False
    no_eval: Annotated[
        bool,
        typer.Option("--no-eval", help="Do not score the artifact against its parent.", rich_help_panel=OUTPUT),
    ] = False
    eval_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Held-out tokens to score; the smoke suite's 16,384 if left out.", rich_help_panel=OUTPUT
        ),
    ] = None

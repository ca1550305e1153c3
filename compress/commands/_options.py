"""Options that several commands share, as dataclasses: the command line is defined once, here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from compress.commands import _debug
from compress.distillation.configs import LOSS_NAMES
from compress.errors import UserError
from compress.formats.names import FORMATS
from compress.pruning.configs import PRUNING_NAMES
from compress.quantization.configs import METHOD_NAMES
from compress.recipe_build import Settings
from compress.recipe_distill import DistillSettings
from compress.recipe_prune import PruneSettings
from compress.workflows.budget.target import METHOD as METHOD_WITHIN

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
        int | None, typer.Option(min=1, help="CPU threads; all cores if left out.", rich_help_panel=GENERAL)
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


@dataclass(frozen=True, kw_only=True)
class Quantize(Run):
    """`compress quantize` and `compress plan quantize`."""

    model: SourceModel = None
    method: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(METHOD_NAMES)}; awq if left out, or what suits --scheme.",
            metavar="NAME",
            rich_help_panel=METHOD,
        ),
    ] = None
    bits: Annotated[
        int | None, typer.Option(help="Bits per weight code, 2 to 8; 4 if left out.", rich_help_panel=METHOD)
    ] = None
    group_size: Annotated[
        str | None,
        typer.Option(
            help="Inputs that share a scale, or `channel`; 128 if left out.",
            metavar="N|channel",
            rich_help_panel=METHOD,
        ),
    ] = None
    scheme: Annotated[
        str | None,
        typer.Option(
            help="Scheme by name, such as W4A16, W8A8 or FP8_DYNAMIC, in place of --bits (`compress methods`).",
            metavar="NAME",
            rich_help_panel=METHOD,
        ),
    ] = None
    symmetric: Annotated[
        bool | None,
        typer.Option("--sym/--asym", help="Zero point absent or stored; --sym if left out.", rich_help_panel=METHOD),
    ] = None
    kv_cache: Annotated[
        str | None,
        typer.Option(
            help="fp8: calibrate and store scales of an FP8 key and value cache, with schemes that round inputs.",
            metavar="NAME",
            rich_help_panel=METHOD,
        ),
    ] = None
    refine: Annotated[
        bool | None,
        typer.Option(
            "--refine/--no-refine",
            help="After the method, tune scales and norms on the KL to the original, with the whole model in memory.",
            rich_help_panel=METHOD,
        ),
    ] = None
    ignore: IgnoredLinears = field(default_factory=list)
    recipe: BaseRecipe = None
    target_bits: Annotated[
        float | None,
        typer.Option(
            help="Mix schemes, measured for the least loss, within so many stored bits per weight of the quantised "
            "linears; gptq if no --method is given.",
            metavar="BITS",
            rich_help_panel=BUDGET,
        ),
    ] = None
    target_size: Annotated[
        str | None,
        typer.Option(
            help="The same within a size of the weight files, such as 3.2GiB.",
            metavar="SIZE",
            rich_help_panel=BUDGET,
        ),
    ] = None
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="The fewest bits whose KL to the model, in nats per token of calibration text, is at most this.",
            metavar="NATS",
            rich_help_panel=BUDGET,
        ),
    ] = None
    calib: CalibrationText = None
    samples: CalibrationSamples = None
    seq_len: CalibrationLength = None
    format: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(FORMATS)}; compressed-tensors if left out.", metavar="NAME", rich_help_panel=OUTPUT
        ),
    ] = None

    def settings(self) -> Settings:
        """The flags that decide the recipe.

        Raises:
            UserError: a group size that is neither an integer nor `channel`, or a format this version cannot write.
        """
        if self.format is not None and self.format not in FORMATS:
            raise UserError(f"unknown format {self.format!r}", f"this version writes {', '.join(FORMATS)}")
        within = any(value is not None for value in (self.target_bits, self.target_size, self.max_kl))
        return Settings(
            method=METHOD_WITHIN if within and self.method is None and self.recipe is None else self.method,
            bits=self.bits,
            group_size=None if within else parse_group_size(self.group_size),
            symmetric=self.symmetric,
            scheme=self.scheme,
            kv_cache=self.kv_cache,
            ignore=self.ignore,
            refine=self.refine,
            format=self.format,
            calib=self.calib,
            samples=self.samples,
            seq_len=self.seq_len,
            seed=self.seed,
            model=self.model,
        )


@dataclass(frozen=True, kw_only=True)
class Prune(Run):
    """`compress prune` and `compress plan prune`."""

    model: SourceModel = None
    method: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(PRUNING_NAMES)}; sparsegpt if left out, with --keep width.",
            metavar="NAME",
            rich_help_panel=METHOD,
        ),
    ] = None
    sparsity: Annotated[
        float | None,
        typer.Option(help="Share of each linear's weights that goes; 0.5 if left out.", rich_help_panel=METHOD),
    ] = None
    pattern: Annotated[
        str | None,
        typer.Option(
            help="n:m, in place of --sparsity: of every m consecutive inputs n stay, as in 2:4.",
            metavar="N:M",
            rich_help_panel=METHOD,
        ),
    ] = None
    keep: Annotated[
        float | None,
        typer.Option(
            help="Of width, depth and experts: share of all parameters that stays; the nearest possible below is made.",
            rich_help_panel=METHOD,
        ),
    ] = None
    repair: Annotated[
        bool | None,
        typer.Option(
            "--repair/--no-repair",
            help="Of width: repair the linears that lose inputs, or not; --repair if left out.",
            rich_help_panel=METHOD,
        ),
    ] = None
    allocation: Annotated[
        str | None,
        typer.Option(
            help="How blocks share a --sparsity: uniform, owl or alphapruning; uniform if left out.",
            metavar="NAME",
            rich_help_panel=METHOD,
        ),
    ] = None
    ignore: IgnoredLinears = field(default_factory=list)
    recipe: BaseRecipe = None
    calib: CalibrationText = None
    samples: CalibrationSamples = None
    seq_len: CalibrationLength = None
    format: Annotated[
        str | None,
        typer.Option(
            help="dense, or sparse-bitmask: smaller on disk, for compress alone; dense if left out.",
            metavar="NAME",
            rich_help_panel=OUTPUT,
        ),
    ] = None

    def settings(self) -> PruneSettings:
        """The flags that decide the recipe."""
        return PruneSettings(
            method=self.method,
            sparsity=self.sparsity,
            pattern=self.pattern,
            keep=self.keep,
            repair=self.repair,
            allocation=self.allocation,
            format=self.format,
            ignore=self.ignore,
            calib=self.calib,
            samples=self.samples,
            seq_len=self.seq_len,
            seed=self.seed,
            model=self.model,
        )


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
            help="Keep the teacher's top tokens in this directory, and learn from them by topk-kl.",
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
    samples: Annotated[
        int | None,
        typer.Option(help="Windows of it, held-out ones too; all if left out.", rich_help_panel=CALIBRATION),
    ] = None
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens per window; 256 if left out.", rich_help_panel=CALIBRATION)
    ] = None

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
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class RunRecipe(Run):
    """`compress run` and `compress plan run`."""

    recipe: Annotated[
        Path,
        typer.Argument(help="Recipe, a YAML file or a shipped name.", metavar="RECIPE", show_default=False),
    ]
    model: Annotated[
        str | None,
        typer.Option(help="Source model, in place of the recipe's `model`.", metavar="MODEL", rich_help_panel=METHOD),
    ] = None
    overrides: Annotated[
        list[str],
        typer.Option(
            "--set", help="Override one key, as in stages.0.scheme.bits=3.", metavar="KEY=VALUE", rich_help_panel=METHOD
        ),
    ] = field(default_factory=list)


def parse_group_size(text: str | None) -> int | str | None:
    """`128` or `channel`, as the flag gives it.

    Raises:
        UserError: neither.
    """
    if text is None or text == "channel":
        return text
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"group size {text!r} is neither an integer nor `channel`", "give for example --group-size 64"
        ) from None

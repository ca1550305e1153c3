"""Options of `compress prune`, and of its plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import typer

from compress.commands._options import (
    CALIBRATION,
    METHOD,
    OUTPUT,
    BaseRecipe,
    CalibrationLength,
    CalibrationSamples,
    CalibrationText,
    IgnoredLinears,
    Run,
    SourceModel,
)
from compress.pruning.configs import PRUNING_NAMES
from compress.recipe_prune import UNDECIDED, PruneSettings
from compress.workflows.cut_target import CutTarget, parse_cut_target


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
    target_params: Annotated[
        str | None,
        typer.Option(
            help="In place of --keep: at most so many parameters, as in 4M or 1.5B.",
            metavar="COUNT",
            rich_help_panel=METHOD,
        ),
    ] = None
    target_size: Annotated[
        str | None,
        typer.Option(
            help="In place of --keep: weight files of at most so many bytes, as in 9MB.",
            metavar="SIZE",
            rich_help_panel=METHOD,
        ),
    ] = None
    target_speedup: Annotated[
        float | None,
        typer.Option(
            help="In place of --keep, of width and depth: so many times as fast as the source, measured here.",
            metavar="FACTOR",
            rich_help_panel=METHOD,
        ),
    ] = None
    speed_of: Annotated[
        str | None,
        typer.Option(
            help="What --target-speedup measures: decode or prefill, of one sequence; decode if left out.",
            metavar="NAME",
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

    stats: Annotated[
        str | None,
        typer.Option(
            help="Keep in this directory what is measured of the whole model, and read it for other amounts and masks.",
            metavar="DIR",
            rich_help_panel=CALIBRATION,
        ),
    ] = None

    def target(self) -> CutTarget | None:
        """What the cut is to come down to; None where --keep says it. Raises UserError for two of them."""
        return parse_cut_target(
            self.target_params, self.target_size, self.target_speedup, speed=self.speed_of, keep=self.keep
        )

    def settings(self) -> PruneSettings:
        """The flags that decide the recipe; a target's `keep` is found later."""
        return PruneSettings(
            method=self.method,
            sparsity=self.sparsity,
            pattern=self.pattern,
            keep=self.keep if self.target() is None else UNDECIDED,
            repair=self.repair,
            allocation=self.allocation,
            format=self.format,
            stats=self.stats,
            ignore=self.ignore,
            calib=self.calib,
            samples=self.samples,
            seq_len=self.seq_len,
            seed=self.seed,
            model=self.model,
        )

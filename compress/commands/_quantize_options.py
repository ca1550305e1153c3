"""Options of `compress quantize`, and of its plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import typer

from compress.commands._options import (
    BUDGET,
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
from compress.errors import UserError
from compress.formats.names import FORMATS
from compress.quantization.configs import METHOD_NAMES
from compress.recipe_build import Settings
from compress.workflows.budget.target import METHOD as METHOD_WITHIN


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
            help="Scheme by name, such as W4A16-g64, W8A8 or FP8_DYNAMIC, in place of --bits (`compress methods`).",
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
            "--kv-scales",
            help="fp8: calibrate and store scales of an FP8 key and value cache.",
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
    embeddings: Annotated[
        str | None,
        typer.Option(
            help="Scheme of the token embedding, such as W8A16-channel or W6A16-g64, or `auto` within a budget; "
            "16 bits if left out. A head that is tied to it goes with it.",
            metavar="SCHEME",
            rich_help_panel=METHOD,
        ),
    ] = None
    head: Annotated[
        str | None,
        typer.Option(
            help="Scheme of the output projection, as for --embeddings.", metavar="SCHEME", rich_help_panel=METHOD
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
    target_file_bits: Annotated[
        float | None,
        typer.Option(
            help="The same over all weights of the model, embeddings, norms and head counted; with --embeddings auto "
            "and --head auto these get schemes of the budget's choice too.",
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
    experts: Annotated[
        str | None,
        typer.Option(
            help="routed: experts of a mixture learn from the tokens that the router sends them; all: from all tokens, "
            "at the cost of running all of them (gptq, awq); routed if left out.",
            metavar="routed|all",
            rich_help_panel=CALIBRATION,
        ),
    ] = None
    redrawn: Annotated[
        int | None,
        typer.Option(
            help="So many copies of every calibration window are read besides, in which the model itself has drawn 30% "
            "of the tokens anew: lower KL from little text, for as many times the reading; none if left out.",
            rich_help_panel=CALIBRATION,
        ),
    ] = None
    format: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(FORMATS)}; compressed-tensors if left out, or what --scheme is for.",
            metavar="NAME",
            rich_help_panel=OUTPUT,
        ),
    ] = None

    def settings(self) -> Settings:
        """The flags that decide the recipe.

        Raises:
            UserError: a group size that is neither an integer nor `channel`, or a format this version cannot write.
        """
        if self.format is not None and self.format not in FORMATS:
            raise UserError(f"unknown format {self.format!r}", f"this version writes {', '.join(FORMATS)}")
        within = any(
            value is not None for value in (self.target_bits, self.target_file_bits, self.target_size, self.max_kl)
        )
        return Settings(
            method=METHOD_WITHIN if within and self.method is None and self.recipe is None else self.method,
            bits=self.bits,
            group_size=None if within else parse_group_size(self.group_size),
            symmetric=self.symmetric,
            scheme=self.scheme,
            kv_cache=self.kv_cache,
            ignore=self.ignore,
            embeddings=self.embeddings,
            head=self.head,
            refine=self.refine,
            format=self.format,
            calib=self.calib,
            samples=self.samples,
            seq_len=self.seq_len,
            experts=self.experts,
            redrawn=self.redrawn,
            seed=self.seed,
            model=self.model,
        )


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

"""The measurements of one model, kept: made once for any number of budgets, and resumable unit by unit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.artifact import durable
from compress.artifact.canonical import sha256_json
from compress.artifact.journal import Journal
from compress.artifact.lock import FileLock, LockedError
from compress.calibration.tokens import CalibrationSet, draw
from compress.errors import UserError
from compress.evaluation.resume import cache_home
from compress.formats.names import refusal
from compress.formats.registry import FORMATS
from compress.models.skeleton import Skeleton
from compress.models.tables import tables
from compress.pipeline.block import Workers
from compress.pipeline.job import Job
from compress.pipeline.resolve import resolve
from compress.pipeline.work import environment
from compress.progress import Progress
from compress.quantization.configs import GptqConfig
from compress.recipe import Recipe
from compress.recipe_sections import CalibrationConfig
from compress.workflows.budget.losses import Measured, Signal, losses
from compress.workflows.budget.recipes import neutral, open_stage
from compress.workflows.budget.sensitivity import measure
from compress.workflows.budget.units import GROUP_SIZES, Unit, grid, table_units, units

LEARNING_WINDOWS = 32
MEASURING_WINDOWS = 8
VERSION = 1
"""Of what is measured and how; another one does not take up older measurements."""


@dataclass(frozen=True)
class Search:
    """A model, a recipe whose schemes are open, the units and their options; nothing is measured yet."""

    recipe: Recipe
    job: Job
    units: list[Unit]
    learning: CalibrationSet
    measuring: Tensor
    """Windows (windows, seq) of the calibration text: those that the method does not learn from where there are any."""
    held_out: bool
    """Whether there are."""

    @property
    def method(self) -> GptqConfig | None:
        """What rounds the weights that are measured: plain GPTQ for GPTQ, None for round to nearest."""
        method = open_stage(self.recipe).method
        if not isinstance(method, GptqConfig):
            return None
        return method.model_copy(update={"correction": 0.0, "descent_sweeps": 0, "refit_rounds": 0})

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """All that the measurements depend on."""
        return {
            "version": VERSION,
            "source": self.job.checkpoint.digest(),
            "method": None if self.method is None else self.method.model_dump(mode="json"),
            "learning": sha256_json(self.learning.tokens[:LEARNING_WINDOWS].tolist()),
            "measuring": sha256_json(self.measuring.tolist()),
            "units": {unit.name: [option.label for option in unit.options] for unit in self.units},
            "environment": environment(torch.float32),
        }

    @property
    def directory(self) -> Path:
        """Where the measurements are kept."""
        return cache_home() / "budget" / sha256_json(self.fingerprint)[:32]

    def known(self) -> dict[str, Measured]:
        """What was measured before."""
        path = self.directory / "units.jsonl"
        return _units(Journal(path)) if path.is_file() else {}

    def losses(self, workers: Workers, progress: Progress) -> list[list[float]]:
        """The KL of every option of every unit; measures what is not known yet, and keeps it."""
        with _alone(self.directory):
            journal = Journal(self.directory / "units.jsonl")
            measured = _units(journal)

            def found(unit: Unit, result: Measured) -> None:
                journal.append(
                    {"unit": unit.name, "errors": dict(result.errors), "divergences": dict(result.divergences)}
                )
                measured[unit.name] = result

            signal = Signal(self.learning.tokens[:LEARNING_WINDOWS], self.measuring, self.method)
            skeleton = Skeleton(self.job.checkpoint, torch.float32)
            measure(skeleton, self.units, signal, dict(measured), found, workers, progress)
        return [losses(unit, measured[unit.name]) for unit in self.units]


def open_search(
    recipe: Recipe,
    *,
    model: str | Path | None,
    output: Path | None,
    device: str,
    group_sizes: Sequence[int | None] | None,
    chosen_tables: Sequence[str] = (),
) -> Search:
    """Opens the source and lays out units and options.

    chosen_tables: `embeddings` and `head`, those of them whose schemes are chosen too; of a tied one, either name.

    Raises:
        UserError: what `pipeline.run` would refuse about model, calibration text and ignored linears, or a recipe that
            leaves nothing to choose.
    """
    stage = open_stage(recipe)
    job = resolve(neutral(recipe), model=model, output=output, device=device)
    assert isinstance(job, Job)
    job.refuse_problems()
    usual = CalibrationConfig()  # for methods that read no text, because a measurement does
    usual = usual.model_copy(update={"seq_len": min(usual.seq_len, job.skeleton.max_positions)})
    outside = tables(job.skeleton)
    scale_bits = {spec.name: 8 * job.scale_dtype(spec).itemsize for spec in (*job.skeleton.linears(), *outside)}
    every = grid(stage.scheme.to_scheme().symmetric, group_sizes=group_sizes or GROUP_SIZES)
    options = [option for option in every if stage.method.refusal(option) is None]
    if not options:
        raise UserError(str(stage.method.refusal(every[0])), "choose a method that rounds weights to integers")
    options = [option for option in options if refusal(stage.format, option) is None]
    two = {"one": options[0], "other": options[-1]}
    if found := FORMATS[stage.format].config_refusal(two, []):
        raise UserError(f"a budget mixes schemes: {found.reason}", "leave --format out")
    learning, measuring, held_out = _texts(job, stage.calibration or usual)
    named = dict(zip(("embeddings", "head"), outside, strict=False))
    asked = {
        table: spec for table, spec in named.items() if table in chosen_tables or (len(named) == 1 and chosen_tables)
    }
    every_unit = [*units(job.skeleton, job.schemes, options, scale_bits), *table_units(asked, options, scale_bits)]
    return Search(recipe, job, every_unit, learning, measuring, held_out)


def _texts(job: Job, wanted: CalibrationConfig) -> tuple[CalibrationSet, Tensor, bool]:
    """What the method learns from, other windows of the same text to measure on, and whether there are any others."""

    def drawn(samples: int) -> CalibrationSet:
        return draw(
            wanted.source,
            job.tokenizer,
            samples=samples,
            seq_len=wanted.seq_len,
            seed=job.recipe.seed,
            longest=job.skeleton.max_positions,
            vocabulary=job.skeleton.vocabulary,
        )

    learning = drawn(wanted.samples)
    try:
        more = drawn(wanted.samples + MEASURING_WINDOWS).tokens  # mostly the same windows: the seed is the same
    except UserError:  # the text has no more
        return learning, learning.tokens[:MEASURING_WINDOWS], False
    learnt = {tuple(window) for window in learning.tokens.tolist()}
    others = [place for place, window in enumerate(more.tolist()) if tuple(window) not in learnt]
    if not others:
        return learning, learning.tokens[:MEASURING_WINDOWS], False
    return learning, more[others[:MEASURING_WINDOWS]], True


def _units(journal: Journal) -> dict[str, Measured]:
    return {
        entry["unit"]: Measured(errors=entry["errors"], divergences=entry["divergences"]) for entry in journal.entries
    }


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    with durable.guarded("create", directory):
        directory.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(directory.with_suffix(".lock"), directory)
    except LockedError as error:
        raise UserError(error.message, "wait for it to finish: it measures what this search needs") from None
    try:
        yield
    finally:
        lock.release()

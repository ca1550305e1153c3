"""Targets of a cut: what is made keeps them and is the largest that does; speeds are searched by what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress import pipeline
from compress.errors import UserError
from compress.pipeline.cut_job import CutJob
from compress.pipeline.cut_sketch import write_sketch
from compress.pipeline.resolve import resolve
from compress.recipe import Recipe
from compress.recipe_prune import PruneSettings, build_prune_recipe
from compress.runtime.loading import load
from compress.workflows import cut_search
from compress.workflows.cut_target import CutTarget, parse_cut_target
from tests.pipeline import harness
from tests.tiny_models import tiny_tokens


def recipe(text: Path, method: str = "width", keep: float = 0.5) -> Recipe:
    """A cut calibrated on 8 windows of 24 tokens."""
    return build_prune_recipe(PruneSettings(method=method, keep=keep, calib=str(text), samples=8, seq_len=24))[0]


@pytest.mark.parametrize(("kind", "written"), [("params", "90k"), ("size", "400kB")])
def test_what_is_made_keeps_the_target_and_one_step_more_would_not(
    kind: str, written: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = tiny("llama")
    settings: dict[str, Any] = {f"target_{kind}": written}
    artifact = compress.prune(
        source, "width", calib=str(text), samples=8, seq_len=24, output=tmp_path / "out", evaluate=False, **settings
    )
    target = parse_cut_target(written if kind == "params" else None, written if kind == "size" else None, None)
    assert target is not None
    sizes = artifact.manifest.sizes
    found = sizes.parameters if kind == "params" else sizes.bytes
    assert found <= target.value
    per_step = 8 * 2 * (3 * 96 + 2)  # eight neurons of two blocks, with biases of gate and up
    slack = per_step if kind == "params" else per_step * 4 + 300
    assert found + slack > target.value, "the largest that fits"
    keep = artifact.manifest.recipe["stages"][0]["keep"]
    assert 0.3 < keep < 1


def test_depth_counts_blocks(tiny: Callable[..., Path], text: Path) -> None:
    source = tiny("llama", num_hidden_layers=4)
    whole: Any = resolve(recipe(text, "depth"), model=source, output=None, device="auto")
    block = (whole.cut.all_parameters - whole.cut.parameters) // whole.cut.drop
    aimed = cut_search.aim(recipe(text, "depth"), CutTarget("params", whole.cut.all_parameters - block), model=source)
    assert aimed.parameters == whole.cut.all_parameters - block


@dataclass
class Machine:
    """A machine on which half the neurons are half as fast again, and which remembers what it was asked."""

    asked: list[float]

    def measured(self, job: Any, source: object, target: CutTarget) -> tuple[float, float, float]:
        self.asked.append(job.cut.keep)
        speed = 2.0 - job.cut.keep
        return speed, speed - 0.1, speed + 0.1


def test_a_speed_is_searched_by_halving(tiny: Callable[..., Path], text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, source = Machine([]), tiny("llama")
    monkeypatch.setattr(cut_search, "measured", machine.measured)
    aimed = cut_search.aim(recipe(text), CutTarget("speedup", 1.3), model=source)
    speedup = aimed.speedup
    assert speedup is not None
    assert speedup.estimate >= 1.3
    assert aimed.parameters / aimed.all_parameters == pytest.approx(0.7, abs=0.03)
    assert len(machine.asked) <= 8
    with pytest.raises(UserError, match="no cut of this kind is 9 times as fast here"):
        cut_search.aim(recipe(text), CutTarget("speedup", 9.0), model=source)


@pytest.mark.parametrize("method", ["width", "depth"])
def test_a_sketch_has_the_shape_of_the_cut(method: str, tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source, wanted = tiny("qwen3", num_hidden_layers=4), recipe(text, method, 0.7)
    job = resolve(wanted, model=source, output=None, device="auto")
    assert isinstance(job, CutJob)
    (tmp_path / "sketch").mkdir()
    write_sketch(job, tmp_path / "sketch")
    made = pipeline.run(wanted, model=source, output=tmp_path / "made").artifact
    shapes = [{n: t.shape for n, t in harness.tensors(path).items()} for path in (tmp_path / "sketch", made.path)]
    assert shapes[0] == shapes[1]
    assert harness.loaded_logits(tmp_path / "sketch", tiny_tokens(1, 8)).isfinite().all()


def test_a_measurement_is_of_both_models(tiny: Callable[..., Path], text: Path) -> None:
    torch.set_num_threads(1)
    source = tiny("llama")
    job = resolve(recipe(text), model=source, output=None, device="auto")
    assert isinstance(job, CutJob)
    for speed in ("decode", "prefill"):
        estimate, low, high = cut_search.measured(job, load(source), CutTarget("speedup", 1.5, speed))  # type: ignore[arg-type]
        assert 0 < low <= estimate <= high


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"params": "4M", "size": "1MB"}, "each say how much stays"),
        ({"params": "4M", "keep": 0.5}, "--target-params and --keep each say"),
        ({"params": "many"}, "no count of parameters"),
        ({"params": "0"}, "no count of parameters"),
        ({"size": "big"}, "is no size"),
        ({"speedup": 0.9}, "is no gain"),
        ({"params": "4M", "speed": "decode"}, "is for --target-speedup"),
        ({"speedup": 2.0, "speed": "reading"}, "one of decode, prefill"),
    ],
)
def test_contradictions_are_named(settings: dict[str, Any], said: str) -> None:
    given = {"params": None, "size": None, "speedup": None, **settings}
    with pytest.raises(UserError, match=said):
        parse_cut_target(**given)


def test_targets_that_nothing_meets_are_named(tiny: Callable[..., Path], text: Path) -> None:
    source = tiny("llama")
    with pytest.raises(UserError, match="is what the model has already"):
        cut_search.aim(recipe(text), CutTarget("params", 10**9), model=source)
    with pytest.raises(UserError, match="would leave no neuron"):
        cut_search.aim(recipe(text), CutTarget("params", 1000), model=source)
    with pytest.raises(UserError, match="leaves no parameter"):
        cut_search.aim(recipe(text), CutTarget("size", 100), model=source)
    mask = build_prune_recipe(PruneSettings(method="magnitude"))[0]
    with pytest.raises(UserError, match="is for cuts, not for magnitude"):
        cut_search.aim(mask, CutTarget("params", 1000), model=source)

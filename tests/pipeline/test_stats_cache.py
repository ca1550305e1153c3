"""Statistics of a whole model that are kept: read instead of measured, never for another source, text or setting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress import pipeline
from compress.errors import UserError
from compress.models.skeleton import Skeleton
from compress.pipeline import (
    cut_plan,
    depth_choice,
    inputs,
    prune_plan,
    width_block,
    width_channels,
    width_gradients,
    width_plan,
)
from compress.progress import NullProgress
from compress.pruning.configs import WandaConfig, WidthConfig
from compress.recipe import Recipe, parse_recipe
from compress.recipe_prune import PruneSettings, build_prune_recipe
from compress.stages import PruneStage
from tests.pipeline import harness

CUTS: dict[str, tuple[dict[str, Any], Any, str]] = {
    "influence": ({"kind": "depth", "choose": "influence"}, depth_choice, "_influences"),
    "loss": ({"kind": "depth"}, depth_choice, "_by_loss"),
    "channels": ({"kind": "width", "hidden": 0.8}, width_channels, "_places"),
    "gradients": ({"kind": "width", "importance": "taylor"}, width_gradients, "_importance"),
}


def recipe(text: Path, method: dict[str, Any], keep: float, stats: Path | None) -> Recipe:
    """A cut calibrated on 8 windows of 24 tokens."""
    stage = {"kind": "prune", "method": method, "keep": keep, "stats": None if stats is None else str(stats)}
    return parse_recipe({"stages": [{**stage, "calibration": {"source": str(text), "samples": 8, "seq_len": 24}}]})


class _Warnings(NullProgress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, note: str) -> None:
        self.said.append(note)


@pytest.mark.parametrize("name", CUTS)
def test_another_amount_reads_what_the_first_measured_and_makes_the_same_bytes(
    name: str, tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, module, function = CUTS[name]
    source, stats = tiny("llama", num_hidden_layers=4), tmp_path / "stats"

    def made(keep: float, kept: Path | None, out: str) -> Any:
        return pipeline.run(recipe(text, method, keep, kept), model=source, output=tmp_path / out).artifact

    made(0.6, stats, "first")
    plain = made(0.8, None, "plain")
    with monkeypatch.context() as patched:
        patched.setattr(module, function, None)  # calling it would fail
        again = made(0.8, stats, "again")
    assert harness.tensor_hashes(again) == harness.tensor_hashes(plain)
    assert again.artifact_id == plain.artifact_id, "where statistics were kept is no matter"
    with monkeypatch.context() as patched:
        patched.setattr(module, function, None)
        other = harness.copy_with(source, tmp_path / "other", lambda t: {n: 1.01 * x for n, x in t.items()})
        with pytest.raises(TypeError):
            pipeline.run(recipe(text, method, 0.8, stats), model=other, output=tmp_path / "else")


MASKS: dict[str, dict[str, Any]] = {
    "wanda": {"kind": "wanda", "norms": "model"},
    "ria": {"kind": "ria", "norms": "model"},
    "sparsegpt": {"kind": "sparsegpt", "moments": "model"},
}


def mask_recipe(text: Path, method: dict[str, Any], stats: Path | None, **amount: Any) -> Recipe:
    stage = {"kind": "prune", "method": method, "stats": None if stats is None else str(stats), **amount}
    return parse_recipe({"stages": [{**stage, "calibration": {"source": str(text), "samples": 8, "seq_len": 24}}]})


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_experts_of_another_amount_are_chosen_without_measuring(
    family: str, tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, stats, method = (
        tiny(family),
        tmp_path / "stats",
        {"kind": "experts", "choose": "saliency", "measured": "model"},
    )
    tokens: list[int] = []
    right = Skeleton.run_block

    def counted(self: Skeleton, module: Any, hidden: Any, call: Any) -> Any:
        tokens.append(hidden.shape[0] * hidden.shape[1])
        return right(self, module, hidden, call)

    def made(keep: float, kept: Path | None, out: str) -> Any:
        tokens.clear()
        return pipeline.run(recipe(text, method, keep, kept), model=source, output=tmp_path / out).artifact

    monkeypatch.setattr(Skeleton, "run_block", counted)
    made(0.95, stats, "first")
    plain = made(0.86, None, "plain")
    assert sum(tokens) > 2 * 8 * 24
    again = made(0.86, stats, "again")
    assert sum(tokens) == 2 * 24, "one window for each block: the check of what was written"
    assert harness.tensor_hashes(again) == harness.tensor_hashes(plain)
    assert again.artifact_id == plain.artifact_id
    assert again.config != made(0.95, stats, "more").config


WIDTH = {"kind": "width", "heads": 0.5, "multiple": 4, "measured": "model"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2's consumers have biases, which take up means
def test_width_of_another_amount_runs_one_chunk_of_the_text(
    family: str, tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, stats = tiny(family), tmp_path / "stats"
    method = {key: value for key, value in WIDTH.items() if key != "heads" or family != "gpt2"}
    tokens: list[int] = []
    right = Skeleton.run_block

    def counted(self: Skeleton, module: Any, hidden: Any, call: Any) -> Any:
        tokens.append(hidden.shape[0] * hidden.shape[1])
        return right(self, module, hidden, call)

    def made(keep: float, kept: Path | None, out: str, **changed: Any) -> Any:
        tokens.clear()
        wanted = recipe(text, {**method, **changed}, keep, kept)
        return pipeline.run(wanted, model=source, output=tmp_path / out).artifact

    monkeypatch.setattr(inputs, "CHUNK_TOKENS", 48)
    monkeypatch.setattr(Skeleton, "run_block", counted)
    made(0.8, stats, "first")
    plain = made(0.9, None, "plain")
    assert sum(tokens) == 2 * (8 * 24 + 3 * 48), "through two blocks: all of the original, and the first chunk"
    again = made(0.9, stats, "again")
    assert sum(tokens) == 2 * 3 * 48, "the first chunk as it was, as cut, and as cut and repaired"
    assert harness.tensor_hashes(again) == harness.tensor_hashes(plain)
    assert again.artifact_id == plain.artifact_id
    assert again.cut() == plain.cut()
    behind = made(0.9, None, "behind", measured="block")
    assert harness.tensor_hashes(behind) != harness.tensor_hashes(plain), "it repairs for what went before"
    run: Callable[..., Any] = pipeline.run
    tokens.clear()
    run(mask_recipe(text, MASKS["wanda"], stats, sparsity=0.5), model=source, output=tmp_path / "mask")
    assert not tokens, "masks share what width measured"


def test_a_width_cut_goes_on_behind_what_is_done(
    tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, wanted = tiny("llama"), recipe(text, WIDTH, 0.9, None)
    whole = pipeline.run(wanted, model=source, output=tmp_path / "whole").artifact
    right = width_block.through_block

    def dies(job: Any, block: int, *rest: Any) -> Any:
        if block == 1:
            raise KeyboardInterrupt
        return right(job, block, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(width_block, "through_block", dies)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(wanted, model=source, output=tmp_path / "again")
    done = pipeline.run(recipe(text, WIDTH, 0.9, tmp_path / "stats"), model=source, output=tmp_path / "again")
    assert done.resumed_blocks == 1
    assert done.artifact.artifact_id == whole.artifact_id
    with pytest.raises(UserError, match="measured: model is for neurons and heads"):
        recipe(text, {**WIDTH, "hidden": 0.5}, 0.9, None)


PLANNED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "width": ("llama", WIDTH, {"keep": 0.9}),
    "channels": ("llama", {"kind": "width", "hidden": 0.8}, {"keep": 0.7}),
    "influence": ("llama", {"kind": "depth", "choose": "influence", "protect_last": 0}, {"keep": 0.8}),
    "experts": ("mixtral", {"kind": "experts", "choose": "saliency", "measured": "model"}, {"keep": 0.95}),
    "wanda": ("llama", MASKS["wanda"], {"sparsity": 0.5}),
}


@pytest.mark.parametrize("name", PLANNED)
def test_a_plan_leaves_out_the_time_of_what_is_there(
    name: str, tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, method, amount = PLANNED[name]
    source, stats = tiny(family), tmp_path / "stats"
    wanted = mask_recipe(text, method, stats, **amount)

    def seconds(given: Recipe, model: Path = source) -> float:
        return pipeline.plan(given, model=model, output=tmp_path / "planned").seconds_estimate

    for module in (width_plan, prune_plan, cut_plan):
        monkeypatch.setattr(module, "on_all_threads", lambda _: 1e-9)  # the same machine every time
    before = seconds(wanted)
    assert before == seconds(mask_recipe(text, method, None, **amount))
    pipeline.run(wanted, model=source, output=tmp_path / "made")
    assert 0 < seconds(wanted) < before
    other = harness.copy_with(source, tmp_path / "other", lambda t: {n: 1.01 * x for n, x in t.items()})
    assert seconds(wanted, other) == before


def _no_forward(*given: Any) -> None:
    raise AssertionError("a block was run")


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_masks_of_every_method_and_amount_come_from_one_pass(
    family: str, tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, stats = tiny(family), tmp_path / "stats"
    run: Callable[..., Any] = pipeline.run
    with monkeypatch.context() as patched:
        patched.setattr(Skeleton, "run_block", _no_forward)
        with pytest.raises(AssertionError, match="a block was run"):
            run(mask_recipe(text, MASKS["wanda"], stats, sparsity=0.5), model=source, output=tmp_path / "never")
    run(mask_recipe(text, MASKS["wanda"], stats, sparsity=0.5), model=source, output=tmp_path / "first")
    amounts: list[dict[str, Any]] = [{"sparsity": 0.3}, {"pattern": "2:4"}, {"sparsity": 0.6}]
    for (name, method), amount in zip(MASKS.items(), amounts, strict=True):
        plain = run(mask_recipe(text, method, None, **amount), model=source, output=tmp_path / f"{name}-plain").artifact
        with monkeypatch.context() as patched:
            patched.setattr(Skeleton, "run_block", _no_forward)
            kept = run(mask_recipe(text, method, stats, **amount), model=source, output=tmp_path / name).artifact
        assert kept.artifact_id == plain.artifact_id
        assert harness.tensor_hashes(kept) == harness.tensor_hashes(plain)
        usual = {key: value for key, value in method.items() if key not in ("norms", "moments")}
        behind = run(mask_recipe(text, usual, None, **amount), model=source, output=tmp_path / f"{name}-usual").artifact
        assert harness.tensor_hashes(behind) != harness.tensor_hashes(plain), "later blocks read what earlier ones lost"


def test_unfinished_statistics_of_masks_are_measured_on(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source, stats = tiny("llama"), tmp_path / "stats"
    wanted = mask_recipe(text, MASKS["sparsegpt"], stats, sparsity=0.5)
    whole = pipeline.run(wanted, model=source, output=tmp_path / "whole").artifact
    second = next(stats.glob("moments-*/shard-00001.safetensors"))
    good = second.read_bytes()
    second.write_bytes(good[:-4] + b"\x01\x02\x03\x04")
    heard = _Warnings()
    again = pipeline.run(wanted, model=source, output=tmp_path / "again", progress=heard).artifact
    assert harness.tensor_hashes(again) == harness.tensor_hashes(whole)
    assert second.read_bytes() == good
    assert any("from block 1" in note for note in heard.said)


def test_a_directory_for_statistics_says_what_masks_are_then_chosen_by(text: Path, tmp_path: Path) -> None:
    settings = PruneSettings(method="wanda", sparsity=0.5, calib=str(text), stats=str(tmp_path))
    made, notes = build_prune_recipe(settings)
    (stage,) = made.stages
    assert isinstance(stage, PruneStage)
    assert isinstance(stage.method, WandaConfig)
    assert stage.method.norms == "model"
    assert any("before any of it is pruned" in note for note in notes)
    with pytest.raises(UserError, match="measures block by block as it goes"):
        mask_recipe(text, {"kind": "wanda"}, tmp_path, sparsity=0.5)
    with pytest.raises(UserError, match="owl measures outliers of its own"):
        mask_recipe(text, MASKS["wanda"], tmp_path, sparsity=0.5, allocation="owl")


def test_a_directory_for_statistics_leaves_gradients_and_channels_their_repair(text: Path, tmp_path: Path) -> None:
    def measured(given: dict[str, Any], stats: Path | None) -> str:
        base = tmp_path / "base.yaml"
        base.write_text(recipe(text, {"kind": "width", **given}, 0.8, None).to_yaml().replace("measured: block", ""))
        settings = PruneSettings(stats=None if stats is None else str(stats))
        (stage,) = build_prune_recipe(settings, base=base)[0].stages
        assert isinstance(stage, PruneStage)
        assert isinstance(stage.method, WidthConfig)
        return stage.method.measured

    assert measured({}, tmp_path) == measured({"importance": "feature"}, tmp_path) == "model"
    assert measured({}, None) == measured({"importance": "taylor"}, tmp_path) == "block"
    assert measured({"hidden": 0.5}, tmp_path) == "block"


def test_what_is_damaged_is_measured_anew_with_a_warning(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source, stats = tiny("llama", num_hidden_layers=4), tmp_path / "stats"
    wanted = recipe(text, {"kind": "depth"}, 0.8, stats)
    whole = pipeline.run(wanted, model=source, output=tmp_path / "whole").artifact
    (shard,) = stats.glob("loss-*/*.safetensors")
    good = shard.read_bytes()
    shard.write_bytes(good[:-4] + b"\x01\x02\x03\x04")
    heard = _Warnings()
    again = pipeline.run(wanted, model=source, output=tmp_path / "again", progress=heard).artifact
    assert harness.tensor_hashes(again) == harness.tensor_hashes(whole)
    assert shard.read_bytes() == good
    assert any("damaged" in note for note in heard.said)


def test_what_measures_as_it_goes_keeps_nothing(text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="measures block by block as it goes"):
        recipe(text, {"kind": "width"}, 0.8, tmp_path)

"""Statistics of a whole model that are kept: read instead of measured, never for another source, text or setting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress import pipeline
from compress.errors import UserError
from compress.pipeline import depth_choice, width_channels, width_gradients
from compress.progress import NullProgress
from compress.recipe import Recipe, parse_recipe
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

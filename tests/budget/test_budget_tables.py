"""Embedding and head within a budget: their schemes are chosen like any linear's, and the file keeps its target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from compress.errors import UserError
from compress.recipe import Recipe, load_recipe
from compress.workflows.budget import search as searching
from compress.workflows.budget.measured import open_search
from compress.workflows.budget.room import file_bytes
from compress.workflows.budget.search import Solver, quantize_to_budget
from compress.workflows.budget.target import Target, chosen_tables
from tests.budget.conftest import SHAPE
from tests.pipeline import harness
from tests.tiny_models import tiny_model

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "FRONT_POINTS", 2)
    monkeypatch.setattr(searching, "png", lambda figure: b"no picture")
    monkeypatch.setattr(searching, "picture", lambda report: None)


def test_a_tied_table_is_a_unit_and_the_file_keeps_its_bits(
    source: Path, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    target = Target("file-bits", 4.5)
    with pytest.raises(UserError, match=r"cannot be met"):
        quantize_to_budget(recipe(), target, model=source, output=tmp_path / "none", evaluate=False)
    result = quantize_to_budget(
        recipe(), target, model=source, output=tmp_path / "out", evaluate=False, chosen_tables=["head"]
    )
    artifact = result.made.artifact
    assert 4.5 * 0.97 < artifact.manifest.sizes.file_bits_per_weight <= 4.5
    (unit,) = [unit for unit in result.report.units if unit.name == EMBEDDING]
    assert {layer["scheme"] for layer in artifact.layers() if layer["name"] == EMBEDDING} == {unit.scheme}
    assert unit.predicted_kl > 0
    assert result.report.chosen.bits_per_weight == pytest.approx(artifact.manifest.sizes.bits_per_weight, abs=1e-6)
    again = load_recipe(artifact.path / "recipe.yaml")
    assert again.stages[0].embeddings is not None  # type: ignore[union-attr]
    from compress import pipeline

    same = pipeline.run(again, model=source, output=tmp_path / "again").artifact
    assert harness.tensor_hashes(same) == harness.tensor_hashes(artifact)


def test_tables_of_their_own_cost_less_the_more_bits_they_have(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "source", tie_word_embeddings=False, **SHAPE)
    wanted = recipe(head={"bits": 8, "group_size": 32})
    fixed = open_search(wanted, model=source, output=None, device="cpu", group_sizes=[32], chosen_tables=["embeddings"])
    assert [unit.table for unit in fixed.units if unit.table] == ["embeddings"]
    both = open_search(
        recipe(), model=source, output=None, device="cpu", group_sizes=[32], chosen_tables=["embeddings", "head"]
    )
    solver = Solver(both, Target("file-bits", 6.0))
    from compress.pipeline.run import deterministic
    from compress.progress import NullProgress

    with deterministic() as workers:
        solver.losses = both.losses(workers, NullProgress())
    for unit, losses in zip(both.units, solver.losses, strict=True):
        if unit.table is not None:
            assert losses == sorted(losses, reverse=True)
            assert losses[-1] > 0
    made = solver.recipe(solver.within_bits()).stages[0]
    assert made.embeddings is not None  # type: ignore[union-attr]
    assert made.head is not None  # type: ignore[union-attr]


def test_a_table_of_a_given_scheme_is_counted(source: Path, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    wanted = recipe(embeddings={"bits": 8, "group_size": 32})
    found = open_search(wanted, model=source, output=None, device="cpu", group_sizes=[32])
    allowed = file_bytes(found.job, found.units, sum(min(unit.bits) for unit in found.units)) + 1000
    made = quantize_to_budget(
        wanted, Target("bytes", allowed), model=source, output=tmp_path / "out", evaluate=False, group_sizes=[32]
    )
    size = made.made.artifact.manifest.sizes.bytes
    assert allowed - 3000 < size <= allowed


def test_auto_needs_a_budget() -> None:
    assert chosen_tables("auto", "w8a16-g32", Target("bits", 4.0)) == ["embeddings"]
    with pytest.raises(UserError, match="--head auto is for a budget"):
        chosen_tables(None, "auto", None)

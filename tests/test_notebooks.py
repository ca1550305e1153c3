"""The notebooks: what is stored is whole, small and names no machine; and a run shows the same again."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXPECTED = ("01_quantize_and_gate", "02_choosing_a_scheme", "03_prune_distil_recover", "04_reading_the_gate")
_NUMBER = re.compile(r"[-+]?\d[\d,.]*(e[-+]?\d+)?")


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("run_notebooks")


def test_all_are_there() -> None:
    assert {path.stem for path in NOTEBOOKS} >= set(EXPECTED)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_as_it_was_run(path: Path, runner: ModuleType) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert runner.problems(notebook) == []
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})]
    assert len(pictures) >= 2


def small() -> nbformat.NotebookNode:
    return nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell("1", execution_count=1, outputs=[nbformat.v4.new_output("stream", text="one")]),
            nbformat.v4.new_code_cell("2", execution_count=2),
        ]
    )


def test_the_check_can_refuse(runner: ModuleType) -> None:
    assert runner.problems(small()) == []
    (cell, other), output = small().cells, nbformat.v4.new_output
    spoiled = {
        "not run once each": {"execution_count": 5},
        "failed: ValueError": {"outputs": [output("error", ename="ValueError", evalue="", traceback=[])]},
        "wrote to stderr": {"outputs": [output("stream", name="stderr", text="careful")]},
        "path of this machine": {"outputs": [output("stream", text="see /home/me/model")]},
        "bytes, ": {"outputs": [output("stream", text="x" * runner.LIMIT_BYTES)]},
    }
    for said, change in spoiled.items():
        notebook = nbformat.v4.new_notebook(cells=[nbformat.from_dict({**cell, **change}), other])
        (problem,) = runner.problems(notebook)
        assert said in problem
    relative = output("stream", text="artifacts/tales/v1 took 2/3 of the time; see docs/home.md")
    cell = nbformat.from_dict({**cell, "outputs": [relative]})
    assert runner.problems(nbformat.v4.new_notebook(cells=[cell, other])) == []


def shown(notebook: nbformat.NotebookNode, runner: ModuleType) -> Iterator[tuple[str, list[tuple[list[str], str]]]]:
    """Per code cell its source, and the kinds and words of its outputs: numbers left out, and texts where tagged."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            varies = "varies" in cell.metadata.get("tags", ())
            outputs = []
            for output in cell.outputs:
                words = "" if varies else " ".join(_NUMBER.sub("#", runner.text_of(output)).split())
                outputs.append((sorted(output.get("data", {"stream": ""})), words))
            yield cell.source, outputs


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_run_shows_the_same_again(path: Path, runner: ModuleType, tmp_path: Path) -> None:
    again = runner.execute(path, tmp_path)
    assert runner.problems(again) == []
    assert list(shown(again, runner)) == list(shown(nbformat.read(path, as_version=4), runner))

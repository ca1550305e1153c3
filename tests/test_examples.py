"""The examples of the Python API run as they are, and say what they promise."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = sorted((Path(__file__).parent.parent / "docs" / "examples").glob("*.py"))
SAID = {
    "plan": ["42 linears at 3.125 bits per weight", "problem: group size 100 does not divide"],
    "quantize": ["4.125 bits per weight", "perplexity ", "largest output error: model.layers."],
    "load": ["float32 on cpu"],
    "evaluate": ["kl_mean"],
    "gate": ["kl:"],
    "artifact": ["kind: gptq", "'quantized': 42", "sound"],
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for all examples: the first one makes the artifact, the others find it complete."""
    return tmp_path_factory.mktemp("examples")


def test_every_example_is_checked() -> None:
    assert {path.stem for path in EXAMPLES} == set(SAID)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(
    path: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    for expected in SAID[path.stem]:
        assert expected in shown

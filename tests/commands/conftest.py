"""Runs the command line inside this process, as `cli.main` does for the console script."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import compress
from compress.cli import main


@dataclass(frozen=True)
class Result:
    """Exit code, stdout and stderr of one command line."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout as the one JSON document that it must be."""
        return json.loads(self.out)

    def refused(self, code: int) -> str:
        """Asserts one `error:` line, one `hint:` line, nothing on stdout and no traceback; returns the error line."""
        lines = self.err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        hints = [line for line in lines if line.startswith("hint: ")]
        assert (self.code, len(errors), len(hints)) == (code, 1, 1), (self.code, self.err)
        assert lines[-2:] == [errors[0], hints[0]]
        assert len(errors[0]) > len("error: ")
        assert len(hints[0]) > len("hint: ")
        assert self.out == ""
        assert "Traceback" not in self.err
        return errors[0]


SMALL = """
[[text]]
name = "tales_heldout"
max_tokens = 2600 # the fewest that two blocks of windows need

[[task]]
name = "tales_cloze"
items = 3

[generation]
prompts = 1
max_tokens = 4
"""


@pytest.fixture(scope="session", autouse=True)
def small_smoke(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small suite in place of `smoke`, so that many artifacts are made in little time; and a cache of the tests' own.

    `test_smoke_itself_scores_what_was_made` runs the real one.
    """
    path = tmp_path_factory.mktemp("suites") / "smoke.toml"
    path.write_text(SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.evaluation.scope.SMOKE", str(path))
        patch.setenv("COMPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """`run("quantize", "--bits", 4)` in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """One CPU thread for what the tests make: they share the machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, one_thread: None, small_smoke: Path) -> Path:
    """A scored RTN artifact; tests copy it before they change anything."""
    path = tmp_path_factory.mktemp("made") / "rtn4"
    assert main(["quantize", "--method", "rtn", "--output", str(path), "--quiet"]) == 0
    return path


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A private copy of it."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A private copy of the packaged model."""
    return Path(shutil.copytree(compress.default_model(), tmp_path / "model"))

"""What every test shares: no network, few threads, the shared material beside the checkout, the packaged model."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "2")  # inherited by the processes that tests start

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # Triton looks at this when it is imported, by whichever test comes first
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples in every run, so that a change is judged by what it changes; `make test-slow` draws new ones.
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip `gpu` tests, with the reason, where there is no device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory of models and texts beside the checkout; the test is skipped where it is absent."""
    path = ROOT.parent / "shared"
    if not (path / "models").is_dir():
        pytest.skip(f"needs {path}, which holds the models and texts to test on")
    return path


@pytest.fixture(scope="session")
def packaged_model() -> Path:
    """The model that ships in the package."""
    from compress.content import default_model

    return default_model()


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> object:
    """Imports a module of the benchmarks package, which is not installed."""
    monkeypatch.syspath_prepend(str(ROOT))

    def module(name: str) -> ModuleType:
        return importlib.import_module(f"benchmarks.{name}")

    return module

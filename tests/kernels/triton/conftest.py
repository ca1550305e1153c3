"""Triton kernels on the GPU where there is one, else in the interpreter, which tests/conftest.py chooses."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels run."""
    return "cuda" if torch.cuda.is_available() else "cpu"

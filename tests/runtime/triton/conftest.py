"""As in tests/kernels/triton: the interpreter where there is no GPU, chosen before the kernels are imported."""

from __future__ import annotations

from tests.kernels.triton.conftest import device

__all__ = ["device"]

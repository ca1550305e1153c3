"""As in tests/kernels/triton: the GPU where there is one, else the interpreter."""

from __future__ import annotations

from tests.kernels.triton.conftest import device

__all__ = ["device"]

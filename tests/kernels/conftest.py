"""Runs a test once for every instruction set that this processor has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from compress.kernels.cpu import _native

ISAS = _native.available_isas()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set in use during the test."""
    before = _native.isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)

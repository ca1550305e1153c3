"""Windows in batches: each once before any comes again, and those that choose teach nothing."""

from __future__ import annotations

import pytest

from compress.calibration.batches import batches, split
from compress.errors import UserError


def test_every_window_is_drawn_once_before_any_comes_again() -> None:
    drawn = batches(range(7), 3, seed=0)
    seen = [window for _ in range(7) for window in next(drawn)]
    assert [sorted(seen[start : start + 7]) for start in (0, 7, 14)] == [list(range(7))] * 3
    again = batches(range(7), 3, seed=0)
    assert [next(again) for _ in range(3)] != [next(batches(range(7), 3, seed=1)) for _ in range(3)]


def test_windows_that_choose_teach_nothing() -> None:
    assert split(16, 0.125) == (list(range(14)), [14, 15])
    assert split(3, 0.01) == ([0, 1], [2])
    with pytest.raises(UserError, match="leaves none to learn from"):
        split(1, 0.5)

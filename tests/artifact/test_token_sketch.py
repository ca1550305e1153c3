"""The sketch of a calibration text: which share of another text it says was calibrated on."""

from __future__ import annotations

import json

import numpy as np
import pytest

from compress.artifact.token_sketch import KEPT, RUN, TokenSketch
from compress.errors import IntegrityError


def windows(count: int, length: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 5000, (count, length))


@pytest.mark.parametrize("size", [20, 2000])
@pytest.mark.parametrize("shared", [0.0, 0.25, 1.0])
def test_the_share_is_found_in_texts_of_any_size(size: int, shared: float) -> None:
    ours, theirs = windows(size), windows(400, seed=1)
    kept = round(shared * 400)
    theirs[:kept] = np.resize(ours, (400, 64))[:kept]
    sketch = TokenSketch.of(ours)
    assert sketch.complete == (size == 20)
    assert len(sketch.hashes) == min(KEPT, size * (64 - RUN + 1))
    found = TokenSketch.parse(sketch.to_bytes()).share_of(theirs)
    assert found == pytest.approx(shared, abs=0.1 if shared == 0.25 else 0.0)


def test_text_that_begins_elsewhere_in_its_window_is_found() -> None:
    ours = windows(30)
    shifted = np.roll(ours.reshape(-1), 10).reshape(30, 64)
    assert TokenSketch.of(ours).share_of(shifted) > 0.6  # but for the runs over the edge of a window


def test_padding_does_not_count() -> None:
    ours = windows(4)
    padded = np.concatenate([ours, np.zeros((4, 64), np.int64)], 1)
    lengths = np.full(4, 64)
    assert TokenSketch.of(ours).share_of(padded, lengths) == 1.0
    assert TokenSketch.of(np.zeros((4, 64), np.int64)).share_of(padded, lengths) == 0.0


def test_windows_shorter_than_a_run_tell_nothing() -> None:
    assert TokenSketch.of(windows(9)).share_of(windows(9, RUN - 1)) is None
    assert TokenSketch.of(windows(9, RUN - 1)).share_of(windows(9)) is None


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"run": 16, "complete": true, "hashes": "?"}'])
def test_damage_is_named(data: bytes) -> None:
    with pytest.raises(IntegrityError, match=r"calibration.json cannot be read"):
        TokenSketch.parse(data)


def test_another_run_length_is_refused() -> None:
    value = json.loads(TokenSketch.of(windows(2)).to_bytes())
    with pytest.raises(IntegrityError, match="another version"):
        TokenSketch.parse(json.dumps({**value, "run": 8}).encode())

"""`calibration.json`: enough of the calibration text to tell later whether a text that is scored repeats it.

Every run of 16 token ids is hashed, and the smallest hashes are kept (bottom-k sketch; Beyer et al., SIGMOD 2007): a
sample of the runs that every other text samples alike, so the share of a text that was calibrated on can be estimated
from it. No text can be read from it.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import IntegrityError

SKETCH_NAME = "calibration.json"
RUN = 16
"""Token ids that must be the same in a row: longer than what two texts of one language share by chance."""
KEPT = 4096

Hashes = NDArray[np.uint64]
_MULTIPLIER, _MIX = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9


@dataclass(frozen=True, eq=False, slots=True)
class TokenSketch:
    """The smallest hashes of a text's runs, sorted; `complete` if they are all."""

    hashes: Hashes
    complete: bool

    @classmethod
    def of(cls, windows: NDArray[np.int64]) -> TokenSketch:
        """The sketch of token windows (count, length); runs do not cross windows."""
        found = np.unique(_hashes(windows))
        return cls(found[:KEPT], len(found) <= KEPT)

    def share_of(self, windows: NDArray[np.int64], lengths: NDArray[np.int64] | None = None) -> float | None:
        """Which share of the runs of `windows` (count, length) is also in the text of this sketch.

        lengths (count,): tokens of each window before its padding. None where neither text has runs to compare.
        """
        runs = _hashes(windows, lengths)
        if not self.complete and len(self.hashes):
            runs = runs[runs <= self.hashes[-1]]
        if not len(runs) or not len(self.hashes):
            return None
        return float(np.isin(runs, self.hashes).mean())

    def to_bytes(self) -> bytes:
        """The file's bytes."""
        packed = base64.b64encode(self.hashes.astype("<u8").tobytes()).decode()
        return (json.dumps({"run": RUN, "complete": self.complete, "hashes": packed}) + "\n").encode()

    @classmethod
    def parse(cls, data: bytes) -> TokenSketch:
        """The sketch in a file's bytes. Raises IntegrityError where it is none."""
        try:
            value: dict[str, Any] = json.loads(data)
            packed = base64.b64decode(value["hashes"], validate=True)
            if value["run"] != RUN or not isinstance(value["complete"], bool):
                raise ValueError("another version")
            return cls(np.frombuffer(packed, dtype="<u8").astype(np.uint64), value["complete"])
        except (ValueError, KeyError, TypeError, binascii.Error) as error:
            raise IntegrityError(f"{SKETCH_NAME} cannot be read: {error}", "make the artifact again") from None


def _hashes(windows: NDArray[np.int64], lengths: NDArray[np.int64] | None = None) -> Hashes:
    """The hash of every run of every window, in one row."""
    count, length = windows.shape
    if length < RUN:
        return np.zeros(0, np.uint64)
    ids = windows.astype(np.uint64) + np.uint64(1)
    places = length - RUN + 1
    total = np.zeros((count, places), np.uint64)
    with np.errstate(over="ignore"):
        for offset in range(RUN):
            total = total * np.uint64(_MULTIPLIER) + ids[:, offset : offset + places]
        total ^= total >> np.uint64(30)
        total *= np.uint64(_MIX)
        total ^= total >> np.uint64(27)
    if lengths is None:
        return total.ravel()
    whole = np.arange(places)[None, :] + RUN <= lengths[:, None]
    return np.asarray(total[whole], dtype=np.uint64)

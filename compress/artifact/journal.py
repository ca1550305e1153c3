"""The journal of a run: one checksummed line per finished piece of work, appended and fsynced.

Each line carries its number, the previous line's hash and its own, so what can be trusted is always a prefix: a
line that a crash tore, or that was damaged or lost, ends it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.artifact import durable
from compress.artifact.canonical import canonical_json, sha256_json


class Journal:
    """The valid entries of a journal file, in order. The file is created if it is not there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            durable.write_bytes(path, b"")
            durable.fsync_dir(path.parent)
        with durable.guarded("read", path):
            self._lines = _valid_lines(path.read_bytes())
        self._records = [json.loads(line) for line in self._lines]

    @property
    def entries(self) -> list[dict[str, Any]]:
        """What was committed, oldest first."""
        return [record["entry"] for record in self._records]

    def keep(self, count: int) -> None:
        """Forget all but the first `count` entries, and whatever unusable bytes follow them."""
        del self._lines[count:], self._records[count:]
        size = sum(len(line) + 1 for line in self._lines)
        if self.path.stat().st_size != size:
            durable.truncate(self.path, size)

    def append(self, entry: dict[str, Any]) -> None:
        """Commit `entry` (plain JSON data): when this returns it is on the disk."""
        previous = self._records[-1]["sha256"] if self._records else None
        record = {"n": len(self._lines), "previous": previous, "entry": entry}
        line = canonical_json({**record, "sha256": sha256_json(record)})
        durable.append_line(self.path, line)
        self._lines.append(line)
        self._records.append(json.loads(line))


def _valid_lines(data: bytes) -> list[bytes]:
    """The longest prefix of whole, undamaged, consecutive lines."""
    valid: list[bytes] = []
    previous = None
    for line in data.split(b"\n")[:-1]:
        try:
            record = json.loads(line)
            claimed = record.pop("sha256")
            sound = claimed == sha256_json(record) and record["n"] == len(valid) and record["previous"] == previous
        except (ValueError, KeyError, TypeError, AttributeError):
            break
        if not sound:
            break
        valid.append(line)
        previous = claimed
    return valid

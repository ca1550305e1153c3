"""Tensors that are written once, shard by shard, by a writer that may be killed at any moment.

    PATH/shards.jsonl                one checksummed line per finished shard, the only authority on what is there
    PATH/shard-00000.safetensors     the tensors of one shard

A killed writer goes on behind its last finished shard; from a shard on that is damaged all are written again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from compress.artifact import durable
from compress.artifact.canonical import sha256_file
from compress.artifact.journal import Journal
from compress.artifact.lock import FileLock
from compress.artifact.tensorfile import load_tensors, write_tensors
from compress.progress import Progress


def complete(path: Path, count: int, make: Callable[[int], dict[str, Tensor]], progress: Progress, doing: str) -> None:
    """Writes the shards, of `count`, that are not there.

    Raises:
        UserError: another process is writing here.
        WorkError: it cannot be written.
    """
    for directory in (*reversed(path.parents), path):
        durable.make_directory(directory)
    lock = FileLock(path / ".lock", path)
    try:
        journal = Journal(path / "shards.jsonl")
        sound = 0
        while sound < min(count, len(journal.entries)) and _intact(path, journal.entries[sound]):
            sound += 1
        journal.keep(sound)
        if sound == count:
            return
        progress.begin(doing, count)
        for shard in range(count):
            if shard >= sound:
                journal.append(_write(path, shard, make(shard)))
            progress.advance(f"shard {shard}")
        progress.end()
    finally:
        lock.release()


def written(path: Path) -> int:
    """How many shards were finished here."""
    journal = path / "shards.jsonl"
    return len(Journal(journal).entries) if journal.is_file() else 0


def read(path: Path, shard: int) -> dict[str, Tensor]:
    """The tensors of one shard, mapped from the file."""
    return load_tensors(path / _name(shard))


def _intact(path: Path, entry: dict[str, str]) -> bool:
    file = path / entry["file"]
    return file.is_file() and sha256_file(file) == entry["sha256"]


def _write(path: Path, shard: int, tensors: dict[str, Tensor]) -> dict[str, str]:
    file = path / _name(shard)
    durable.unlink(file)  # a damaged one may be mapped by another process, which keeps it so
    _, sha256 = write_tensors(file, tensors)
    durable.fsync_dir(path)
    return {"file": file.name, "sha256": sha256}


def _name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"

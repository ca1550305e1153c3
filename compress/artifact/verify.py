"""Check an artifact byte by byte against its manifest, and the manifest against itself.

Found: any changed byte in any file, missing and unknown files, missing, extra, renamed or reshaped tensors, a
ledger that does not add up, and any edit to the manifest, to scores or to the card.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from compress.artifact.canonical import read_chunks, sha256_file
from compress.artifact.ledger import ledger_problems
from compress.artifact.manifest import (
    CARD_NAME,
    EVAL_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    SAMPLES_NAME,
    Manifest,
    TensorRecord,
)
from compress.artifact.reader import follow_latest, is_artifact
from compress.artifact.tensorfile import StoredTensor, read_header
from compress.errors import IntegrityError, UserError


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: the file (relative to the artifact) and what is wrong with it."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


@dataclass(slots=True)
class Report:
    """The outcome: no `problems` means that every one of `files` files and `bytes` bytes is as it was published."""

    path: Path
    artifact_id: str | None = None
    problems: list[Problem] = field(default_factory=list)
    files: int = 0
    bytes: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(path: str | Path) -> Report:
    """Check the artifact at `path`. Raises UserError only if there is no artifact; all else is in the report."""
    directory = follow_latest(Path(path))
    if not is_artifact(directory):
        raise UserError(
            f"{path} is not an artifact: it holds no {MANIFEST_NAME}", "`compress list` shows what there is"
        )
    report = Report(directory)
    data = (directory / MANIFEST_NAME).read_bytes()
    manifest, faults = Manifest.examine(data)
    report.problems += [Problem(MANIFEST_NAME, fault) for fault in faults]
    report.files, report.bytes = 1, len(data)
    if manifest is None:
        return report
    report.artifact_id = manifest.artifact_id
    listed = {name: record.sha256 for name, record in manifest.files.items()} | manifest.attachments
    for problem in _unknown(directory, listed):
        report.problems.append(problem)
    for name, sha256 in listed.items():
        report.problems += _check_file(report, directory / name, sha256, manifest)
    report.problems += _check_tensor_places(manifest)
    report.problems += [Problem(MANIFEST_NAME, fault) for fault in _check_ledger(manifest)]
    report.problems += _check_eval(directory / EVAL_NAME, manifest)
    return report


def require_sound(path: str | Path, *, scores: bool = True) -> None:
    """Raise IntegrityError, naming the first problems, unless the artifact at `path` verifies.

    With `scores` False, what attaching scores writes may be wrong: an interrupted attaching leaves it so, and no
    byte of it has a part in what the model computes.
    """
    problems = [problem for problem in verify(path).problems if scores or not _of_scores(problem.file)]
    if problems:
        shown = "; ".join(str(problem) for problem in problems[:3])
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise IntegrityError(
            f"{path} is damaged: {shown}{more}", f"see `compress verify {path}`; make or fetch it again"
        )


def _of_scores(name: str) -> bool:
    files = (EVAL_NAME, SAMPLES_NAME, CARD_NAME)
    return name in files or name in {f".{file}.tmp" for file in (*files, MANIFEST_NAME)}


def _unknown(directory: Path, listed: Mapping[str, str]) -> Iterator[Problem]:
    for entry in sorted(directory.iterdir()):
        if entry.name == MANIFEST_NAME or entry.name in listed:
            continue
        if entry.name.startswith(".") and entry.name.endswith(".tmp"):
            yield Problem(entry.name, "left behind when attaching was interrupted: attach again, or remove it")
        else:
            yield Problem(entry.name, "not listed in the manifest")


def _check_file(report: Report, path: Path, sha256: str, manifest: Manifest) -> list[Problem]:
    name = path.name
    if not path.is_file():
        return [Problem(name, "missing")]
    report.files += 1
    size = path.stat().st_size
    report.bytes += size
    problems = []
    record = manifest.files.get(name)
    if record is not None and record.bytes != size:
        problems.append(Problem(name, f"{size} bytes long, the manifest says {record.bytes}"))
    if not name.endswith(".safetensors"):
        if sha256_file(path) != sha256:
            problems.append(Problem(name, "its content is not what the manifest says"))
        return problems
    expected = {tensor: entry for tensor, entry in manifest.tensors.items() if entry.file == name}
    return problems + _check_weights(path, sha256, expected)


def _check_weights(path: Path, sha256: str, expected: Mapping[str, TensorRecord]) -> list[Problem]:
    name = path.name
    try:
        stored = read_header(path)
    except IntegrityError as error:
        return [Problem(name, error.message)]
    problems = [Problem(name, f"tensor {tensor} is missing") for tensor in sorted(set(expected) - set(stored))]
    problems += [Problem(name, f"tensor {tensor} is extra") for tensor in sorted(set(stored) - set(expected))]
    for tensor, record in expected.items():
        there = stored.get(tensor)
        if there is not None and (there.dtype, list(there.shape)) != (record.dtype, record.shape):
            problems.append(
                Problem(
                    name,
                    f"tensor {tensor} is {there.dtype} {list(there.shape)}, "
                    f"the manifest says {record.dtype} {record.shape}",
                )
            )
    whole, hashes = _hash_file_and_tensors(path, stored)
    changed = [tensor for tensor, record in expected.items() if hashes.get(tensor, record.sha256) != record.sha256]
    problems += [Problem(name, f"the bytes of tensor {tensor} are not what the manifest says") for tensor in changed]
    if whole != sha256 and not problems:
        problems.append(Problem(name, "its header is not what the manifest says"))
    return problems


def _hash_file_and_tensors(path: Path, stored: Mapping[str, StoredTensor]) -> tuple[str, dict[str, str]]:
    """SHA-256 of the file and of each of its tensors (which cover all of it after the header), in one reading."""
    whole = hashlib.sha256()
    ordered = sorted((t for t in stored.values() if t.nbytes), key=lambda tensor: tensor.start)
    digests = {tensor.name: hashlib.sha256() for tensor in stored.values()}
    position, current = 0, 0
    for chunk in read_chunks(path):
        whole.update(chunk)
        end = position + len(chunk)
        while current < len(ordered) and ordered[current].start < end:
            tensor = ordered[current]
            begin = max(tensor.start, position)
            stop = min(tensor.start + tensor.nbytes, end)
            digests[tensor.name].update(chunk[begin - position : stop - position])
            if stop < tensor.start + tensor.nbytes:
                break
            current += 1
        position = end
    return whole.hexdigest(), {name: digest.hexdigest() for name, digest in digests.items()}


def _check_tensor_places(manifest: Manifest) -> list[Problem]:
    """Tensors placed in a file that is not listed, an index without shards, shards without an index."""
    problems = [
        Problem(MANIFEST_NAME, f"tensor {name} is placed in {record.file}, which is not listed")
        for name, record in manifest.tensors.items()
        if record.file not in manifest.files
    ]
    shards = {name for name in manifest.files if name.endswith(".safetensors")}
    if (len(shards) > 1) != (INDEX_NAME in manifest.files):
        problems.append(
            Problem(
                MANIFEST_NAME,
                f"{len(shards)} weight files are listed, with"
                + ("" if INDEX_NAME in manifest.files else "out")
                + " an index",
            )
        )
    return problems


def _check_ledger(manifest: Manifest) -> list[str]:
    outputs = {name: record.sha256 for name, record in manifest.tensors.items()}
    return ledger_problems(manifest.ledger, manifest.ledger, outputs)


def _check_eval(path: Path, manifest: Manifest) -> list[Problem]:
    """Scores must be those of this artifact, where they say whose they are."""
    if EVAL_NAME not in manifest.attachments or not path.is_file():
        return []
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return []  # damaged, and its hash has said so; or attached as it is
    owner = record.get("artifact_id") if isinstance(record, dict) else None
    if owner is not None and owner != manifest.artifact_id:
        return [Problem(EVAL_NAME, f"its scores are those of artifact {owner}, not of this one")]
    return []

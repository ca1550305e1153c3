"""Crash a run at every durable step and report, as JSON lines, what each crash left and what the next run made of it.

A program of its own: it forks a process per crash, which is safe only where no thread pool has been started.

    python -m tests.artifact.crash_driver FOLDER SCENARIO...
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress.artifact import durable
from compress.artifact.attach import attach_eval
from compress.artifact.canonical import sha256_file
from compress.artifact.journal import Journal
from compress.artifact.lock import is_locked
from compress.artifact.output import lock_path, staging_path
from compress.artifact.reader import Artifact
from compress.artifact.scores import headline_scores
from compress.artifact.verify import verify
from compress.errors import CompressError
from tests.artifact import producer

CRASHED = 137
LAST_FILE = "before write compress_manifest.json"


class Crasher:
    """Replaces `durable.step`: counts the steps and ends the process at step number `at`."""

    def __init__(self, at: int, log: Path) -> None:
        self.at = at
        self.log = log
        self.count = 0

    def __call__(self, label: str) -> None:
        self.count += 1
        if self.count == self.at:
            self.log.write_text(label)
            os._exit(CRASHED)


def in_child(work: Callable[[], Any], crash_at: int, log: Path) -> int:
    """Run `work` in a forked process that dies at the given durable step; its exit status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            durable.step = Crasher(crash_at, log)
            work()
            status = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def weights(path: Path) -> list[tuple[str, str]]:
    """Name and hash of every weight file."""
    return [(file.name, sha256_file(file)) for file in sorted(path.glob("*.safetensors"))]


def seen(output: Path) -> str:
    """What stands at the output: absent, an artifact's recipe hash, or broken."""
    if not output.exists():
        return "absent"
    try:
        return Artifact.open(output).manifest.recipe_hash if verify(output).ok else "broken"
    except CompressError:
        return "other"


def committed(output: Path) -> int:
    """Blocks in the journal of an unfinished run, not counting the outer tensors' entry."""
    journal = staging_path(output) / "journal.jsonl"
    return max(0, len(Journal(journal).entries) - 1) if journal.exists() else 0


def crash_everywhere(
    folder: Path,
    prepare: Callable[[Path], None] = lambda output: None,
    *,
    after: str | None = None,
    every: int = 1,
    twice: bool = False,
    **options: Any,
) -> None:
    """Crash at every `every`-th step until a run gets through; print one record per crash.

    `after` names a step to begin from instead of the first. With `twice`, the run that goes on from there is crashed
    too, at one of its first steps.
    """
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text("{}\n")
    crash_at = 1 if after is None else step_number(after, folder, prepare, tokenizer, options)
    while True:
        place = folder / str(crash_at)
        place.mkdir()
        output = place / "out"
        prepare(output)
        log = place / "label"
        status = in_child(lambda: producer.run(output, tokenizer, **options), crash_at, log)  # noqa: B023
        if status == 0:
            break
        record: dict[str, Any] = {"scenario": folder.name, "step": crash_at, "status": status, "label": log.read_text()}
        if twice:
            in_child(lambda: producer.run(output, tokenizer, **options), 1 + crash_at * 7 % 50, log)  # noqa: B023
            record["label"] += ", then " + log.read_text()
        record["locked"] = is_locked(lock_path(output))
        record["seen"] = seen(output)
        record["staged"] = staging_path(output).exists()
        record["committed"] = committed(output)
        outcome = producer.run(output, tokenizer, **options)
        record["computed"] = len(outcome.computed)
        record["already"] = outcome.already
        record["problems"] = [str(problem) for problem in verify(output).problems]
        record["weights"] = weights(output)
        record["recipe"] = outcome.artifact.manifest.recipe_hash
        record["left"] = sorted(entry.name for entry in place.iterdir() if entry.name not in ("out", "label"))
        record["notes"] = [file.read_text() for file in sorted(place.glob("*/notes.txt"))]
        print(json.dumps(record), flush=True)
        shutil.rmtree(place)
        crash_at += every


def step_number(
    label: str, folder: Path, prepare: Callable[[Path], None], tokenizer: Path, options: dict[str, Any]
) -> int:
    """The number of the step called `label` in an undisturbed run."""
    labels: list[str] = []
    output = folder / "undisturbed" / "out"
    output.parent.mkdir()
    prepare(output)
    durable.step = labels.append
    producer.run(output, tokenizer, **options)
    durable.step = lambda label: None
    return labels.index(label) + 1


def crash_attach(folder: Path) -> None:
    """Crash the attaching of scores at every step."""
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text("{}\n")
    original = producer.run(folder / "original", tokenizer).artifact
    record = {"artifact_id": original.artifact_id, "summary": {"kl_mean": {"estimate": 0.1}}}
    attach_eval(original.path, {**record, "summary": {"kl_mean": {"estimate": 0.5}}})
    crash_at = 1
    while True:
        output = Path(shutil.copytree(original.path, folder / str(crash_at)))
        log = folder / "label"
        status = in_child(lambda: attach_eval(output, record), crash_at, log)  # noqa: B023
        if status == 0:
            break
        problems = [problem.file for problem in verify(output).problems]
        opened = Artifact.open(output).artifact_id
        artifact = attach_eval(output, record)
        row = {
            "scenario": folder.name,
            "label": log.read_text(),
            "status": status,
            "problems": problems,
            "same_id": opened == artifact.artifact_id == original.artifact_id,
            "after": [str(problem) for problem in verify(output).problems],
            "kl": headline_scores(artifact.eval())["kl_mean"].value,
        }
        print(json.dumps(row), flush=True)
        crash_at += 1


def somebodys_directory(output: Path) -> None:
    """A directory that no run made stands at the output."""
    output.mkdir()
    (output / "notes.txt").write_text("do not lose me")


def main(scenario: str, folder: Path) -> None:
    """Run one scenario."""
    old = folder / "old"

    def old_artifact(output: Path) -> None:
        if not old.exists():
            producer.run(old, folder / "tokenizer.json", who=producer.identity(recipe_hash="0" * 64))
        shutil.copytree(old, output)

    if scenario == "fresh":
        crash_everywhere(folder)
    elif scenario == "twice":
        crash_everywhere(folder, twice=True, every=6)
    elif scenario == "replace":
        crash_everywhere(folder, old_artifact, after=LAST_FILE, restart=True)
    elif scenario == "replace-without-exchange":
        exchange, durable._renameat2_exchange = durable._renameat2_exchange, lambda left, right: False
        crash_everywhere(folder, old_artifact, after=LAST_FILE, restart=True)
        durable._renameat2_exchange = exchange
    elif scenario == "replace-directory":
        crash_everywhere(folder, somebodys_directory, after=LAST_FILE, restart=True)
    elif scenario == "attach":
        crash_attach(folder)
    else:
        raise SystemExit(f"unknown scenario {scenario}")


if __name__ == "__main__":
    for name in sys.argv[2:]:
        place = Path(sys.argv[1], name)
        place.mkdir()
        main(name, place)

"""Crash quantisation runs at durable steps and report, as JSON lines, what each crash left and what came of it.

A program of its own: it forks a process per run from one that has everything loaded and no threads.

    python -m tests.pipeline.crash_driver FOLDER METHOD FIRST STRIDE
    python -m tests.pipeline.crash_driver FOLDER METHOD --kill COUNT MODEL TEXT
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from compress import pipeline
from compress.artifact import durable
from compress.artifact.journal import Journal
from compress.artifact.lock import is_locked
from compress.artifact.output import lock_path, staging_path
from compress.artifact.reader import Artifact
from compress.artifact.verify import verify
from compress.errors import CompressError
from compress.recipe import Recipe
from tests.pipeline.harness import recipe, tensor_hashes, write_text
from tests.tiny_models import tiny_model

CRASHED = 137
BLOCKS = 4
TINY = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


def forked(work: Callable[[], Any]) -> int:
    """Starts `work` in a forked process; its exit status is 0 once it has come back, 1 if it raised."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    return child


def status_of(child: int) -> int:
    """Waits for a process that `forked` started."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def crash_at(step: int, log: Path) -> Callable[[str], None]:
    """A `durable.step` that ends the process at the given step, at once and without cleaning up."""
    count = 0

    def hook(label: str) -> None:
        nonlocal count
        count += 1
        if count == step:
            log.write_text(label)
            os._exit(CRASHED)

    return hook


def run(wanted: Recipe, source: Path, output: Path, report: Path) -> None:
    """One run; writes what it did."""
    result = pipeline.run(wanted, model=source, output=output)
    manifest = result.artifact.manifest
    report.write_text(
        json.dumps(
            {
                "resumed": result.resumed_blocks,
                "computed": result.computed_blocks,
                "already": result.complete_already,
                "artifact_id": result.artifact.artifact_id,
                "tensors": tensor_hashes(result.artifact),
                "ledger": {name: entry.model_dump() for name, entry in manifest.ledger.items()},
                "fallbacks": [fallback.model_dump() for fallback in manifest.fallbacks],
                "layers": result.artifact.layers(),
                "problems": [str(problem) for problem in verify(output).problems],
                "left": sorted(entry.name for entry in output.parent.iterdir() if entry != output),
            }
        )
    )


def seen(output: Path) -> str:
    """What stands at the output: absent, the id of a sound artifact, or broken."""
    if not output.exists():
        return "absent"
    try:
        return Artifact.open(output).artifact_id if verify(output).ok else "broken"
    except CompressError:
        return "broken"


def journalled(output: Path) -> int:
    """Blocks that the journal of an unfinished run holds, the tensors outside the blocks not counted."""
    path = staging_path(output) / "journal.jsonl"
    return max(0, len(Journal(path).entries) - 1) if path.exists() else 0


def after_crash(output: Path) -> dict[str, Any]:
    """What a crash left."""
    return {
        "seen": seen(output),
        "locked": is_locked(lock_path(output)),
        "staged": staging_path(output).exists(),
        "journalled": journalled(output),
    }


def crash_at_steps(folder: Path, method: str, first: int, stride: int) -> None:
    """Crash a run at step `first` and every `stride`-th after it, each in a directory of its own, then run it again."""
    source = tiny_model("llama", folder / "model", **TINY)
    text = write_text(folder / "text.txt")
    wanted = recipe(method, text, samples=6, seq_len=12, group_size=16)
    reports = folder / "report.json"
    assert status_of(forked(lambda: run(wanted, source, folder / "undisturbed" / "out", reports))) == 0
    print(json.dumps({"step": None, **json.loads(reports.read_text())}), flush=True)
    step = first
    while True:
        place = folder / str(step)
        place.mkdir()
        output, log = place / "out", folder / "label"

        def crashing(step: int = step, output: Path = output, log: Path = log) -> None:
            durable.step = crash_at(step, log)
            run(wanted, source, output, folder / "never.json")

        status = status_of(forked(crashing))
        if status == 0:
            break
        record: dict[str, Any] = {"step": step, "status": status, "label": log.read_text(), **after_crash(output)}
        record["rerun"] = status_of(forked(lambda output=output: run(wanted, source, output, reports)))
        print(json.dumps(record | json.loads(reports.read_text())), flush=True)
        shutil.rmtree(place)
        step += stride


def kill_at_random(folder: Path, method: str, count: int, model: Path, text: Path) -> None:
    """Kill longer runs at random moments, `count` times in all; a killed run is run again and may be killed again."""
    wanted = recipe(method, text, samples=32, seq_len=256, group_size=64)
    reports, choose = folder / "report.json", random.Random(0)
    started = time.monotonic()
    assert status_of(forked(lambda: run(wanted, model, folder / "undisturbed" / "out", reports))) == 0
    whole = time.monotonic() - started
    print(json.dumps({"step": None, **json.loads(reports.read_text())}), flush=True)
    kills = attempt = 0
    while kills < count:
        attempt += 1
        output = folder / str(attempt) / "out"
        output.parent.mkdir()
        killed: list[dict[str, Any]] = []
        while True:
            before = journalled(output)
            child = forked(lambda output=output: run(wanted, model, output, reports))
            if kills < count:
                time.sleep(choose.uniform(0.05, 0.8) * whole)
                os.kill(child, signal.SIGKILL)
            status = status_of(child)
            if status == 0:
                break
            kills += 1
            killed.append({"status": status, "before": before, **after_crash(output)})
        record = {"step": attempt, "killed": killed, "before": before}
        print(json.dumps(record | json.loads(reports.read_text())), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    place, method = Path(sys.argv[1]), sys.argv[2]
    if sys.argv[3] == "--kill":
        kill_at_random(place, method, int(sys.argv[4]), Path(sys.argv[5]), Path(sys.argv[6]))
    else:
        crash_at_steps(place, method, int(sys.argv[3]), int(sys.argv[4]))

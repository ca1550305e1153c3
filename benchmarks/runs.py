"""Commands that make one artifact each, kept with the identity of their inputs and redone only when it changes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Output = dict[str, Any]


def is_kept(folder: Path, identity: Mapping[str, Any], ignoring: Sequence[str] = ()) -> bool:
    """Whether `folder` holds a finished run of this identity; the fields of `ignoring` may differ."""
    record = folder / "result.json"
    if not record.exists():
        return False
    found = json.loads(record.read_text())["identity"]
    return bool({**found, **{name: identity[name] for name in ignoring}} == identity)


def run(
    folder: Path,
    identity: Mapping[str, Any],
    command: Sequence[str],
    threads: int,
    prepare: Callable[[], object] | None = None,
) -> Output:
    """Runs a command that leaves what it makes in `folder`, and prints one JSON document, or one on its last line.

    What was in the folder before goes first; then `prepare` may put files there. Returns that document.

    Raises:
        RuntimeError: the command fails; its output is in `log.txt`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if prepare is not None:
        prepare()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    (folder / "log.txt").write_text(done.stdout + done.stderr)
    if done.returncode != 0:
        raise RuntimeError(f"{folder} failed with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    output = _document(done.stdout)
    (folder / "result.json").write_text(json.dumps({"identity": dict(identity), "output": output}, indent=2) + "\n")
    return output


def _document(printed: str) -> Output:
    text = printed.strip()
    output: Output = json.loads(text if text.startswith("{") else text.splitlines()[-1])
    return output


def output_of(folder: Path) -> Output:
    """What the command of a finished run printed."""
    output: Output = json.loads((folder / "result.json").read_text())["output"]
    return output

"""Load time and memory of a model, taken in a fresh process: what this one already holds does not count.

Memory is host anonymous memory (RssAnon on Linux) or what torch allocated on the device. Its peak covers one load, one
forward pass per batch size and one answer; load times are taken afterwards, because watching the memory costs time.
Weights that stay mapped from their files are counted apart: they are page cache, which the system may take back.
Free of torch: the child does the work.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress import errors
from compress.errors import WorkError
from compress.evaluation.costs.record import MemoryKind

SAMPLING_SECONDS = 0.002
_ENTRY = "from compress.evaluation.costs.child import main; main()"


@dataclass(frozen=True, slots=True)
class Job:
    """What the fresh process does: load `path`, run `tokens` per row and batch size, continue `prompt`, load again."""

    path: str
    device: str
    dtype: str
    kernel: str
    threads: int
    prompt: str
    tokens: int
    new_tokens: int
    batch_sizes: Sequence[int]
    loads: int
    kv_cache: str = "auto"
    deterministic: bool = False


@dataclass(frozen=True, slots=True)
class Fresh:
    """What it took: seconds of each load; bytes held once loaded, at most, and of files mapped (None: not known)."""

    load_seconds: list[float]
    memory_kind: MemoryKind | None
    held_bytes: int | None
    peak_bytes: int | None
    mapped_bytes: int | None


def in_fresh_process(job: Job, seconds: float | None = None, done: Callable[[str], None] | None = None) -> Fresh:
    """Runs a job, for `seconds` at most: what is not known by then is None, or fewer loads. `done` is told each step.

    Raises:
        UserError, IntegrityError: what loading the model raises.
        WorkError: out of memory, or the process died.
    """
    command = [sys.executable, "-P", "-c", _ENTRY]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        watch = _Watch(child.pid)
        noise: list[str] = []
        listener = threading.Thread(target=lambda: noise.extend(child.stderr or ()), daemon=True)
        listener.start()
        ended = threading.Event()

        def end() -> None:
            ended.set()
            child.kill()

        timer = threading.Timer(seconds or 0.0, end)
        if seconds is not None:
            timer.start()
        try:
            fresh = _converse(child, job, watch, done or (lambda _: None))
        except BaseException:
            child.kill()
            raise
        finally:
            watch.stop()
            timer.cancel()
        status = child.wait()
        listener.join()  # its last words are in the pipe when it ends, and read only a while later
    if not ended.is_set() and (status != 0 or len(fresh.load_seconds) != job.loads):
        said = f": {noise[-1].strip()}" if noise else ""
        raise WorkError(
            f"the process that loads {job.path} afresh ended with {status} after {len(fresh.load_seconds)} loads{said}",
            "is there memory for a second copy of the model? `--no-fresh` leaves load time and memory out",
        )
    return fresh


def _converse(child: subprocess.Popen[str], job: Job, watch: _Watch, done: Callable[[str], None]) -> Fresh:
    assert child.stdin is not None
    assert child.stdout is not None
    cuda = job.device.startswith("cuda")
    loads: list[float] = []
    before: int | None = None
    files_before: int | None = None
    held: int | None = None
    peak: int | None = None
    mapped: int | None = None
    _answer(child, json.dumps(asdict(job)))
    for line in child.stdout:
        step: dict[str, Any] = json.loads(line)
        if step["step"] == "error":
            raise getattr(errors, step["kind"], WorkError)(step["message"], step["hint"])
        now = step.get("allocated") if cuda else resident_bytes(child.pid)
        files = resident_bytes(child.pid, "RssFile")
        if step["step"] == "ready":
            before, files_before = now, files
            watch.start()
        elif step["step"] == "loaded":
            held = _more(now, before)
        elif step["step"] == "used":
            watch.stop()
            most = step.get("peak") if cuda else watch.peak_with(now)
            peak = _more(most, before)
            mapped = _more(files, files_before)
        elif step["step"] == "load":
            loads.append(step["seconds"])
        done(step["step"])
        _answer(child, "on")
    kind: MemoryKind | None = None if peak is None else "device" if cuda else "host anonymous"
    return Fresh(loads, kind, held, peak, mapped)


def _answer(child: subprocess.Popen[str], text: str) -> None:
    assert child.stdin is not None
    try:
        child.stdin.write(text + "\n")
        child.stdin.flush()
    except BrokenPipeError:  # it died or is done; its exit status tells which
        pass


def _more(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else max(0, after - before)


def resident_bytes(pid: int, kind: str = "RssAnon") -> int | None:
    """Resident memory of a process in bytes: anonymous, or `RssFile`; None where it is gone or nobody says."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")]
    return 1024 * kilobytes[0] if kilobytes else None


class _Watch:
    """A thread that looks at a process' anonymous memory every 2 ms and keeps the largest."""

    def __init__(self, pid: int) -> None:
        self._peak: int | None = None
        self._pid = pid
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def peak_with(self, now: int | None) -> int | None:
        """The largest seen, `now` included; None if nothing was."""
        return max((seen for seen in (self._peak, now) if seen is not None), default=None)

    def _look(self) -> None:
        while not self._done.wait(SAMPLING_SECONDS):
            self._peak = self.peak_with(resident_bytes(self._pid))

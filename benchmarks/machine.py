"""What a measurement has to know of its machine: facts for the record, whether it is quiet, what a child used."""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SAMPLING_SECONDS = 0.002


def facts() -> dict[str, str | int]:
    """CPU, cores, memory, kernel and Python; nothing that names the machine or its paths."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def versions(*names: str) -> dict[str, str]:
    """Installed versions of distributions in this environment."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def busy_seconds() -> float:
    """CPU seconds spent by everybody on all cores since boot, idle and waiting for disks not counted."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _idle, _wait, irq, softirq = fields[:7]
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def wait_until_quiet(limit: float, busy_cores: float = 0.15, watch: float = 3.0) -> float:
    """Wait until fewer than `busy_cores` cores are busy over `watch` seconds, `limit` seconds at most.

    Returns the busy cores of the last watch, so that a record can say how quiet it was.
    """
    deadline = time.monotonic() + limit
    while True:
        before, started = busy_seconds(), time.monotonic()
        time.sleep(watch)
        busy = (busy_seconds() - before) / (time.monotonic() - started)
        if busy < busy_cores or time.monotonic() > deadline:
            return round(busy, 3)


@dataclass(frozen=True)
class Child:
    """A finished command: its output, wall seconds, CPU seconds, what others used meanwhile, and its memory peaks."""

    stdout: str
    stderr: str
    returncode: int
    seconds: float
    cpu_seconds: float
    others_busy_cores: float
    anonymous_peak_bytes: int
    resident_peak_bytes: int


def run(command: Sequence[str], environment: Mapping[str, str], *, sample_memory: bool = False) -> Child:
    """Run a command to its end.

    With `sample_memory` its RssAnon is read every 2 ms: anonymous memory, without the page cache of mapped files.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        busy, started, peak = busy_seconds(), time.monotonic(), 0
        process = subprocess.Popen(list(command), env=dict(environment), stdout=out, stderr=err)
        if sample_memory:
            while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                peak = max(peak, anonymous_bytes(process.pid))
                time.sleep(SAMPLING_SECONDS)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - started
        cpu = usage.ru_utime + usage.ru_stime
        out.seek(0)
        err.seek(0)
        return Child(
            stdout=out.read(),
            stderr=err.read(),
            returncode=process.returncode,
            seconds=seconds,
            cpu_seconds=cpu,
            others_busy_cores=max(0.0, (busy_seconds() - busy - cpu) / seconds),
            anonymous_peak_bytes=peak,
            resident_peak_bytes=usage.ru_maxrss * 1024,
        )


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process; 0 once it has no memory any more."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0

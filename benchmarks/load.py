"""How long a model takes to load with its files in the page cache, and what anonymous memory that needs at its peak.

    python -m benchmarks.load ARTIFACT [ARTIFACT ...] --json benchmarks/results/load.json

Each run is a fresh process: libraries first, then one load with an answer, whose anonymous memory is watched every 2 ms
from outside, then loads that are timed. Memory is above what the process held before; the bars are those of a load in
a runtime that repacks weights: 3 seconds, and 1.25 times the file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks import machine
from compress.evaluation.costs.process import Job, in_fresh_process

SECONDS, MEMORY = 3.0, 1.25


def measured(model: Path, kernel: str, threads: int, runs: int, loads: int) -> dict[str, Any]:
    """One model with one kernel: medians, with the least and the greatest."""
    job = Job(str(model), "cpu", "auto", kernel, threads, "Once upon a time", 64, 16, [1], loads)
    quiet = machine.wait_until_quiet(60)
    fresh = [in_fresh_process(job) for _ in range(runs)]
    files = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    seconds = [one for each in fresh for one in each.load_seconds]
    peaks = [each.peak_bytes for each in fresh if each.peak_bytes is not None]
    return {
        "model": model.name,
        "kernel": kernel,
        "file_bytes": files,
        "seconds": statistics.median(seconds),
        "seconds_range": [min(seconds), max(seconds)],
        "peak_anonymous_bytes": statistics.median(peaks),
        "peak_range": [min(peaks), max(peaks)],
        "peak_share_of_file": statistics.median(peaks) / files,
        "mapped_bytes": statistics.median([each.mapped_bytes or 0 for each in fresh]),
        "others_busy_cores_before": quiet,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--kernels", nargs="+", default=["cpu", "cpu-int8"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3, help="fresh processes, one peak each")
    parser.add_argument("--loads", type=int, default=3, help="timed loads in each of them")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    for model in given.models:
        for kernel in given.kernels:
            row = measured(model.resolve(), kernel, given.threads, given.runs, given.loads)
            rows.append(row)
            held = row["seconds"] < SECONDS and row["peak_share_of_file"] < MEMORY
            print(
                f"{row['model']:14} {kernel:9} {row['file_bytes'] / 1e6:7.0f} MB: {row['seconds']:.2f} s "
                f"[{row['seconds_range'][0]:.2f}, {row['seconds_range'][1]:.2f}], peak {row['peak_share_of_file']:.2f} "
                f"of the file, {row['mapped_bytes'] / 1e6:.0f} MB mapped: {'within' if held else 'BEYOND'} the bars",
                flush=True,
            )
    if given.json:
        record = {
            "command": " ".join(["python -m benchmarks.load", *sys.argv[1:]]),
            "machine": machine.facts(),
            "versions": machine.versions("compress", "torch"),
            "threads": given.threads,
            "rows": rows,
        }
        given.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

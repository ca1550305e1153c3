"""Quantises the packaged model, runs it, scores it and gates it, through the installed command line.

`make quickstart` calls this after installing. Each command is echoed as a user would type it; what it shows goes to the
terminal, its JSON result is read here for the closing table. Safe to run again: it then makes the next version.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import compress

PROMPT = "Once upon a time there was a king"
EVAL_TOKENS = 32768


def call(*words: object, allowed: tuple[int, ...] = (0,)) -> tuple[dict[str, Any], int]:
    """Runs one command line with --json; returns its document and exit code, or ends the script as it ended."""
    arguments = [str(word) for word in words]
    print(f"\n$ compress {shlex.join(arguments)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "compress.cli", *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode not in allowed:
        sys.exit(done.returncode)
    document: dict[str, Any] = json.loads(done.stdout)
    return document, done.returncode


def from_here(path: Path) -> Path:
    """The path as a user would type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main() -> int:
    """The commands and the table. Returns the gate's exit code."""
    started = time.perf_counter()
    model = from_here(compress.default_model())
    made, _ = call("quantize", "--method", "awq", "--bits", 4)
    where = from_here(Path(made["artifact"]))
    answer, _ = call("generate", where, "--prompt", PROMPT, "--max-tokens", 64)
    print(PROMPT + answer["text"])
    speed, _ = call("bench", where, "--baseline", model, "--batch-sizes", 1, "--no-fresh")
    record_path = where.parent / f"{where.name}.eval.json"
    record, _ = call("eval", where, "--baseline", model, "--max-tokens", EVAL_TOKENS, "--output", record_path)
    verdict, code = call("gate", record_path, allowed=(0, 1, 3))
    print(f"gate: {verdict['verdict']}")
    print_table(made, record, speed)
    print(f"\n{where} made, run, scored and gated in {time.perf_counter() - started:.0f} s")
    return code


def print_table(made: dict[str, Any], record: dict[str, Any], speed: dict[str, Any]) -> None:
    """Size, quality and speed, before and after."""
    summary, sizes = record["texts"][0]["summary"], made["sizes"]
    models = (record["baseline"], record["model"])
    perplexities = (summary["perplexity_baseline"], summary["perplexity"])
    speeds = (speed[cost]["decode_tokens_per_second"]["median"] for cost in ("cost_baseline", "cost"))
    rows = [
        ("", "before", "after"),
        ("weight files, MB", *(f"{m['weights_bytes'] / 1e6:.2f}" for m in models)),
        ("bits per weight, quantised linears", "16", f"{sizes['bits_per_weight']:.3f}"),
        ("bits per weight, whole file", *(f"{m['bits_per_weight']:.2f}" for m in models)),
        ("perplexity", *(f"{p['estimate']:.2f}" for p in perplexities)),
        ("KL per token, nats", "0", f"{summary['kl_mean']['estimate']:.4f}"),
        ("same top token", "100%", f"{summary['top1_agreement']['estimate']:.1%}"),
        ("decoding, tokens/s", *(f"{s:.0f}" for s in speeds)),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    print()
    for row in rows:
        print(f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}")


if __name__ == "__main__":
    sys.exit(main())

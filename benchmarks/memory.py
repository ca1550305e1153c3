"""Anonymous memory that `compress quantize` needs at its peak, above the interpreter's base.

    python -m benchmarks.memory --tokenizer ../shared/data/tales/tokenizer --json benchmarks/results/memory.json

Anonymous memory (RssAnon) is what a machine must really have; mapped checkpoint files are page cache that the system
can drop. It is sampled every 2 ms from outside. The base is a process that has imported torch, transformers and the
pipeline and then waits. Two questions:
    rtn    RTN W4 of a random 2-billion-parameter bfloat16 checkpoint of several shards
    gptq   GPTQ and AWQ of one shape with 4, 8 and 16 blocks: does the peak grow with the number of blocks?
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, tokens
from benchmarks.make_random_llama import PRESETS, make_random_llama

BASE = (
    "import time, torch, transformers, compress.pipeline; "
    "from transformers import AutoTokenizer, AutoModelForCausalLM, LlamaForCausalLM; time.sleep(0.5)"
)


def environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def base_bytes(threads: int) -> int:
    """Anonymous memory of an interpreter with everything imported."""
    child = machine.run([sys.executable, "-c", BASE], environment(threads), sample_memory=True)
    if child.returncode != 0:
        raise SystemExit(f"error: the base process failed:\n{child.stderr[-2000:]}")
    return child.anonymous_peak_bytes


def model(work: Path, tokenizer: Path, name: str, **shape: int) -> Path:
    """A random checkpoint, made once."""
    path = work / name
    if not (path / "tokenizer.json").exists():
        shutil.rmtree(path, ignore_errors=True)
        print(f"writing {name}", file=sys.stderr)
        make_random_llama(path, tokenizer, shard_bytes=500_000_000, **shape)
    return path


def measure(
    model_dir: Path, method: str, threads: int, calibration: Path | None, samples: tuple[int, int]
) -> dict[str, Any]:
    """Peak of one `compress quantize --bits 4 --group-size 128` into a fresh directory, so that nothing is resumed."""
    options = [] if calibration is None else ["--calib", str(calibration)]
    if calibration is not None:
        options += ["--samples", str(samples[0]), "--seq-len", str(samples[1])]
    with tempfile.TemporaryDirectory(dir=model_dir.parent) as folder:
        command = [str(Path(sys.executable).with_name("compress")), "quantize", str(model_dir), "--method", method]
        command += ["--bits", "4", "--group-size", "128", *options, "--output", f"{folder}/artifact"]
        child = machine.run([*command, "--no-eval", "--json", "--quiet"], environment(threads), sample_memory=True)
    if child.returncode != 0:
        raise SystemExit(f"error: {method} of {model_dir.name} ended with {child.returncode}:\n{child.stderr[-3000:]}")
    return {
        "anonymous_peak_bytes": child.anonymous_peak_bytes,
        "resident_peak_bytes": child.resident_peak_bytes,
        "process_seconds": round(child.seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory whose tokenizer the models carry")
    parser.add_argument(
        "--work", type=Path, default=Path("build/benchmarks/memory"), help="needs 6 GB for the 2b model"
    )
    parser.add_argument("--only", choices=("rtn", "gptq", "all"), default="all")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--methods", nargs="+", choices=("gptq", "awq"), default=["gptq", "awq"])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the record here")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    sizes = (arguments.samples, arguments.seq_len)
    base = base_bytes(arguments.threads)
    results: list[dict[str, Any]] = []

    def note(name: str, method: str, blocks: int, measured: dict[str, Any]) -> None:
        above = measured["anonymous_peak_bytes"] - base
        results.append({"model": name, "method": method, "blocks": blocks, **measured, "above_base_bytes": above})
        print(f"| {name} | {method} | {blocks} | {above / 1e6:.0f} | {measured['process_seconds']:.0f} |", flush=True)

    print(f"base: {base / 1e6:.0f} MB anonymous\n")
    print("| model | method | blocks | peak above base, MB | seconds |\n|---|---|---|---|---|")
    if arguments.only in ("rtn", "all"):
        big = model(work, arguments.tokenizer, "random-2b", **PRESETS["2b"])
        note("random-2b", "rtn", PRESETS["2b"]["layers"], measure(big, "rtn", arguments.threads, None, sizes))
    if arguments.only in ("gptq", "all"):
        shape = PRESETS["148m"]
        calibration = work / "tokens.safetensors"
        tokens.save(np.random.default_rng(0).integers(4, shape["vocabulary"], sizes, dtype=np.int64), calibration)
        for blocks in arguments.blocks:
            name = f"random-{blocks}-blocks"
            path = model(work, arguments.tokenizer, name, **{**shape, "layers": blocks})
            for method in arguments.methods:
                note(name, method, blocks, measure(path, method, arguments.threads, calibration, sizes))
    if arguments.json:
        record = {
            "machine": machine.facts(),
            "versions": machine.versions("compress", "torch", "transformers"),
            "threads": arguments.threads,
            "samples": arguments.samples,
            "seq_len": arguments.seq_len,
            "sampling_seconds": machine.SAMPLING_SECONDS,
            "base_anonymous_bytes": base,
            "results": results,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Speed of compress against llm-compressor: algorithm time and whole process, alternating in one run.

    PEER_LLMC_PYTHON=<python with llmcompressor 0.14> python -m benchmarks.speed --model tales-6m=MODEL_DIR \
        --text ../shared/data/tales/tales_calib.txt --threads 2 --json benchmarks/results/speed-tales-6m.json

Both tools get the same token file, threads, bits and group size. Algorithm seconds: weights in memory (or, for us, on
disk: blocks are streamed) to quantised tensors; ours includes writing and fsyncing them, theirs is the `oneshot` call.
Process seconds: from start to exit, saving included. Each repeat runs both, in turns which goes first; ratios are taken
within a repeat. A run starts only when the machine is quiet, and is marked disturbed when others used more than a
quarter of a core meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, tokens
from benchmarks.workspace import ROOT, weights_digest

DISTURBED_CORES = 0.25


def token_file(arguments: argparse.Namespace, model_dir: Path, folder: Path) -> Path:
    """Calibration tokens: windows of --text, or random ids without it (a random model knows no language)."""
    config = json.loads((model_dir / "config.json").read_text())
    if arguments.text:
        ids = tokens.encode(arguments.text, model_dir)
        drawn = tokens.calibration_windows(ids, config["bos_token_id"], arguments.samples, arguments.seq_len, seed=0)
    else:
        shape = (arguments.samples, arguments.seq_len)
        drawn = np.random.default_rng(0).integers(4, config["vocab_size"], shape, dtype=np.int64)
    path = folder / "tokens.safetensors"
    tokens.save(drawn, path)
    return path


def our_command(
    arguments: argparse.Namespace, model_dir: Path, method: str, calibration: Path, output: Path
) -> list[str]:
    samples = ["--samples", str(arguments.samples), "--seq-len", str(arguments.seq_len), "--calib", str(calibration)]
    return [
        *(str(Path(sys.executable).with_name("compress")), "quantize", str(model_dir), "--method", method),
        *("--bits", str(arguments.bits), "--group-size", str(arguments.group_size)),
        *(samples if method != "rtn" else []),
        *("--output", str(output), "--no-eval", "--json", "--quiet"),
    ]


def peer_command(
    arguments: argparse.Namespace, model_dir: Path, method: str, calibration: Path, output: Path
) -> list[str]:
    return [
        *(str(arguments.peer_python), str(ROOT / "benchmarks" / "peer_llmcompressor.py"), "--model", str(model_dir)),
        *("--method", method, "--bits", str(arguments.bits), "--group-size", str(arguments.group_size)),
        *("--calib-tokens", str(calibration), "--output", str(output), "--threads", str(arguments.threads)),
        *("--batch-size", str(arguments.peer_batch_size)),
    ]


def measure(
    arguments: argparse.Namespace, tool: str, model_dir: Path, method: str, calibration: Path
) -> dict[str, Any]:
    """One run of one tool in a fresh output directory. SystemExit with the tool's last words when it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment[name] = str(arguments.threads)
    before = machine.wait_until_quiet(arguments.patience)
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        make = our_command if tool == "compress" else peer_command
        child = machine.run(make(arguments, model_dir, method, calibration, Path(folder) / "out"), environment)
    if child.returncode != 0:
        raise SystemExit(f"error: {tool} {method} ended with {child.returncode}:\n{child.stderr[-3000:]}")
    document = json.loads(child.stdout if tool == "compress" else child.stdout.strip().splitlines()[-1])
    return {
        "algorithm_seconds": document["seconds" if tool == "compress" else "algorithm_seconds"],
        "process_seconds": round(child.seconds, 3),
        "cpu_seconds": round(child.cpu_seconds, 3),
        "busy_cores_before": before,
        "others_busy_cores": round(child.others_busy_cores, 3),
        "disturbed": child.others_busy_cores > DISTURBED_CORES,
        "versions": document.get("versions", {}),
    }


def summarise(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Medians of both tools and median, least and greatest ratio, over the undisturbed pairs (all, where none is)."""
    quiet = [pair for pair in pairs if not (pair[0]["disturbed"] or pair[1]["disturbed"])]
    used = quiet or pairs
    summary: dict[str, Any] = {"pairs": len(pairs), "undisturbed_pairs": len(quiet)}
    for key in ("algorithm_seconds", "process_seconds"):
        ratios = [ours[key] / theirs[key] for ours, theirs in used]
        summary[key] = {
            "compress": statistics.median(ours[key] for ours, _ in used),
            "llm-compressor": statistics.median(theirs[key] for _, theirs in used),
            "ratio": round(statistics.median(ratios), 4),
            "ratio_least": round(min(ratios), 4),
            "ratio_greatest": round(max(ratios), 4),
        }
    return summary


def render(results: list[dict[str, Any]]) -> str:
    lines = [
        "| model | method | | compress, s | llm-compressor, s | ratio | spread | quiet pairs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for key, label in (("algorithm_seconds", "algorithm"), ("process_seconds", "whole process")):
            row = result["summary"][key]
            spread = f"{row['ratio_least']:.3f} to {row['ratio_greatest']:.3f}"
            quiet = f"{result['summary']['undisturbed_pairs']} of {result['summary']['pairs']}"
            seconds = f"{row['compress']:.2f} | {row['llm-compressor']:.2f}"
            lines.append(
                f"| {result['model']} | {result['method']} | {label} | {seconds} "
                f"| {row['ratio']:.3f} | {spread} | {quiet} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="NAME=DIR; the name stands in the results")
    parser.add_argument("--methods", nargs="+", choices=("rtn", "gptq", "awq"), default=["gptq", "awq"])
    parser.add_argument("--text", type=Path, help="calibration text (default: random token ids)")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", default="128")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-python", default=os.environ.get("PEER_LLMC_PYTHON"))
    parser.add_argument("--peer-batch-size", type=int, default=1, help="llm-compressor's default is 1")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds to wait for a quiet machine")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks/speed"))
    parser.add_argument("--json", type=Path, help="write the record here")
    arguments = parser.parse_args()
    if not arguments.peer_python:
        parser.error("llm-compressor's Python is unknown: set PEER_LLMC_PYTHON or --peer-python")
    name, _, directory = arguments.model.partition("=")
    model_dir = Path(directory).resolve()
    arguments.work = arguments.work.resolve()
    arguments.work.mkdir(parents=True, exist_ok=True)
    calibration = token_file(arguments, model_dir, arguments.work)

    results = []
    for method in arguments.methods:
        pairs = []
        for repeat in range(arguments.repeats):
            order = ("compress", "llm-compressor") if repeat % 2 == 0 else ("llm-compressor", "compress")
            pair = {tool: measure(arguments, tool, model_dir, method, calibration) for tool in order}
            print(f"{name} {method} {repeat + 1}/{arguments.repeats}: {json.dumps(pair)}", file=sys.stderr, flush=True)
            pairs.append((pair["compress"], pair["llm-compressor"]))
        results.append({"model": name, "method": method, "summary": summarise(pairs), "pairs": pairs})
    print(render(results))
    if arguments.json:
        record = {
            "machine": machine.facts(),
            "versions": machine.versions("compress", "torch", "transformers"),
            "model_sha256": weights_digest(model_dir),
            **{
                k: getattr(arguments, k)
                for k in ("samples", "seq_len", "bits", "group_size", "threads", "peer_batch_size")
            },
            "results": results,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

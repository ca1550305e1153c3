"""The size-quality front over all stored parameters: ours beside llm-compressor, AutoRound, llama.cpp and HQQ.

    PEER_LLMC_PYTHON=... PEER_AUTOROUND_PYTHON=... PEER_HQQ_PYTHON=... PEER_LLAMACPP_PYTHON=... \
        python -m benchmarks.front --shared ../shared --json benchmarks/results/front.json --plot build/front.png

Makes what is missing, scores all points on the same held-out windows, and prints for every point of another tool the
best of ours that has at most its bits. Bits are those of all stored tensors over all parameters, embeddings in (tied
ones once). A tool whose environment is not given is left out, with a word, unless its artifacts are kept already.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks import cases, machine
from benchmarks.front_points import ours, peers
from benchmarks.front_table import plot, render, rows
from benchmarks.points import OURS, TOOLS, measure
from benchmarks.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="directory with data/ and models/")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"), help="artifacts and kept scores")
    parser.add_argument("--models", nargs="+", choices=tuple(cases.MODELS), default=["tales-6m", "tales-6m-twin"])
    parser.add_argument("--tools", nargs="+", choices=(*TOOLS, OURS), default=[*TOOLS, OURS])
    parser.add_argument(
        "--points", nargs="+", metavar="NAME", help="these points alone, of all tools that are asked for"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(cases.SEEDS))
    parser.add_argument("--eval-tokens", type=int, default=cases.EVAL_TOKENS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--any-version", action="store_true", help="take our artifacts made by other versions as well")
    parser.add_argument("--plot", type=Path, help="write a picture of each model's front here (.png or .svg)")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    workspace = Workspace(
        arguments.work.resolve(), arguments.shared.resolve(), None, arguments.threads, arguments.any_version
    )
    tables = {}
    for model in arguments.models:
        points = [point for point in (*peers(model), *ours(model)) if point.tool in arguments.tools]
        if arguments.points:
            points = [point for point in points if point.name in arguments.points]
        measured = measure(workspace, model, points, arguments.seeds, arguments.eval_tokens)
        tables[model] = rows(measured)
        print(f"\n{model}\n\n{render(tables[model])}")
        if arguments.plot:
            plot(model, measured, arguments.plot.with_stem(f"{arguments.plot.stem}-{model}"))
    if arguments.json:
        record = {
            "machine": machine.facts(),
            "versions": machine.versions("compress", "torch", "transformers", "compressed-tensors"),
            "eval_tokens": arguments.eval_tokens,
            "calibration": {"samples": cases.SAMPLES, "seq_len": cases.SEQ_LEN, "seeds": arguments.seeds},
            "models": {name: workspace.digest(workspace.model_dir(name)) for name in arguments.models},
            "rows": tables,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""What a token reads and what it costs in quality, ours beside llama.cpp's: the packaged model of `vs_llama_cpp`.

    PEER_LLAMACPP_PYTHON=... python -m benchmarks.llama_quality --shared ../shared \
        --json benchmarks/results/llama-quality.json

Both sides' weights are decoded and scored by one evaluator on the same held-out tokens, as in `front`, so this is what
rounding weights costs. Both engines then round what enters a product to 8 bits; for ours that is measured too, with the
engine's own logits. A random model, as the large shapes of the speed comparison are, has no quality to lose.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks import cases, machine
from benchmarks.points import OURS, Measured, Point, measure, tensors
from benchmarks.workspace import Workspace

SCHEME = {"bits": 4, "group_size": 128}


def points() -> list[Point]:
    """llama.cpp's two formats of 4 bits, with its importance matrix and without, and what the speeds were taken of."""
    found = [Point("llama.cpp", kind, ("--type", kind), text=False) for kind in ("Q4_0", "Q4_K_M")]
    found += [Point("llama.cpp", f"{kind} imatrix", ("--type", kind)) for kind in ("Q4_0", "Q4_K_M")]
    for method, bits in (("rtn", 8), ("gptq", 8), ("gptq", 6)):
        head = {"bits": bits, "group_size": "channel"}
        stage = {"kind": "quantize", "method": method, "scheme": SCHEME, "head": head}
        recipe = json.dumps({"version": 1, "stages": [stage]})
        found.append(Point(OURS, f"{method} W4A16 g128, head W{bits}A16", (), method != "rtn", recipe))
    return found


def load_cpu_int8(model_dir: Path) -> Any:
    """An artifact in our engine with inputs rounded to 8 bits, called as a model of transformers is."""
    from compress.runtime.loading import load

    runtime = load(model_dir, device="cpu", kernel="cpu-int8")

    def forward(ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=runtime.score(ids))

    return forward


def row(base: Path, found: Measured, in_engine: Measured | None) -> dict[str, Any]:
    """One line of the table. A tied embedding is the head, so a token reads all that is stored."""
    parameters = sum(count for count, _ in tensors(base).values())
    return {
        "tool": found.tool,
        "point": found.name,
        "bytes_per_token": round(found.file_bits * parameters / 8),
        "kl": found.sums.mean_kl,
        "kl_in_engine": None if in_engine is None else in_engine.sums.mean_kl,
        "seeds": len(found.seeds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="directory with data/ and models/")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"), help="artifacts and kept scores")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(cases.SEEDS))
    parser.add_argument("--eval-tokens", type=int, default=cases.EVAL_TOKENS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all numbers here")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    workspace = Workspace(arguments.work.resolve(), arguments.shared.resolve(), None, arguments.threads)
    model, base = "tales-6m", workspace.model_dir("tales-6m")
    if not json.loads((base / "config.json").read_text())["tie_word_embeddings"]:
        raise SystemExit(f"{model} does not tie its embeddings: a token reads less than is stored")
    measured = measure(workspace, model, points(), arguments.seeds, arguments.eval_tokens)
    own = [point for point in points() if point.tool == OURS]
    in_engine = measure(workspace, model, own, arguments.seeds, arguments.eval_tokens, load_cpu_int8)
    rows = [row(base, one, next((e for e in in_engine if e.name == one.name), None)) for one in measured]
    print("| tool | point | MB a token | KL, weights alone | KL in our engine, 8-bit inputs |\n|---|---|---|---|---|")
    for one in rows:
        engine = "" if one["kl_in_engine"] is None else f"{one['kl_in_engine']:.5f}"
        print(f"| {one['tool']} | {one['point']} | {one['bytes_per_token'] / 1e6:.3f} | {one['kl']:.5f} | {engine} |")
    if arguments.json:
        record = {
            "machine": machine.facts(),
            "versions": machine.versions("compress", "torch", "transformers"),
            "model": workspace.digest(base),
            "eval_tokens": arguments.eval_tokens,
            "seeds": arguments.seeds,
            "rows": rows,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

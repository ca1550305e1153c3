"""Our 4-bit products beside PyTorch's int4 CPU kernel, in turns: the same codes, groups of 128, weights from memory.

    python -m benchmarks.vs_torch_int4 --json benchmarks/results/vs-torch-int4.json

Every shape has as many copies of its weight as exceed the last-level cache, and a measurement goes through all of them.
`int8` is our product that rounds inputs to 8 bits (the engine's default), `exact` the one that takes them as they are;
PyTorch's takes bfloat16 inputs. Ratios are taken within a round, PyTorch's time over ours.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from compress.formats.int_packed import pack_bits
from compress.kernels.packed_linear import multiply, pack_codes
from compress.types import IntScheme

SHAPES = ((2048, 2048), (8192, 2048), (2048, 8192))
"""Rows and columns of the weights."""
TOKENS = (1, 4, 16)
GROUP = 128
CACHE_BYTES = 96_000_000
BAR = 1.8


def products(rows: int, columns: int, seed: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """One random weight as each tool multiplies with it; x is (tokens, columns) float32."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
    scale = (torch.rand(rows, columns // GROUP, generator=generator) * 0.01 + 0.005).bfloat16()
    ours = pack_codes(pack_bits(codes, 4), scale, None, columns, IntScheme(bits=4, group_size=GROUP))
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu((codes + 8).int(), 1)
    grids = torch.stack([scale.T, torch.zeros_like(scale.T)], dim=-1).contiguous()
    return {
        "int8": lambda x: multiply(ours, x, eight_bit=True),
        "exact": lambda x: multiply(ours, x),
        "torch": lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), theirs, GROUP, grids),
    }


def measure(rows: int, columns: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Microseconds of each tool (medians), ratios over PyTorch's, and how far the results are apart."""
    copies = [products(rows, columns, seed) for seed in range(math.ceil(CACHE_BYTES / (rows * columns / 2)))]
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0))
    wanted = copies[0]["exact"](x)
    apart = {name: float((make(x).float() - wanted).norm() / wanted.norm()) for name, make in copies[0].items()}
    times: dict[str, list[float]] = {name: [] for name in copies[0]}
    for _ in range(rounds):
        for name, taken in times.items():
            started = time.perf_counter()
            for copy in copies:
                copy[name](x)
            taken.append((time.perf_counter() - started) / len(copies) * 1e6)
    result: dict[str, Any] = {"rows": rows, "columns": columns, "tokens": tokens, "relative_difference": apart}
    result["microseconds"] = {name: round(statistics.median(taken), 1) for name, taken in times.items()}
    for name in ("int8", "exact"):
        ratios = [theirs / ours for theirs, ours in zip(times["torch"], times[name], strict=True)]
        result[name] = [round(f(ratios), 2) for f in (statistics.median, min, max)]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    before, results = machine.wait_until_quiet(30, watch=0.5), []
    print("| weight | tokens | int8, exact, torch, us | torch / int8 | torch / exact |\n|---|---|---|---|---|")
    for rows, columns in SHAPES:
        for tokens in TOKENS:
            found = measure(rows, columns, tokens, arguments.rounds)
            results.append(found)
            spreads = (f"{found[n][0]:.2f} ({found[n][1]:.2f} to {found[n][2]:.2f})" for n in ("int8", "exact"))
            taken = ", ".join(str(found["microseconds"][name]) for name in ("int8", "exact", "torch"))
            print(f"| {rows} x {columns} | {tokens} | {taken} | {' | '.join(spreads)} |", flush=True)
    means = {name: statistics.geometric_mean(r[name][0] for r in results) for name in ("int8", "exact")}
    print(f"geometric mean: int8 {means['int8']:.2f}, exact {means['exact']:.2f} (bar {BAR})")
    if arguments.json:
        record = {
            "machine": machine.facts(), "versions": machine.versions("compress", "torch"), "threads": arguments.threads,
            "others_busy_cores_before": round(before, 3), "bar": BAR, "geometric_means": means, "results": results,
        }  # fmt: skip
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

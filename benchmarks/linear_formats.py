"""One token's product by the format of its weight: bytes of weights read per second, from memory, in turns.

    python -m benchmarks.linear_formats --threads 1 --json benchmarks/results/linear-formats.json

Every format has as many copies of its weight as exceed the last-level cache, and a round goes through all of them. A
product takes about a millisecond, so the fastest of all says what the kernel does where a busy machine interrupts most.
Products `x int8` round inputs to 8 bits, the others take float32 ones.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from compress.kernels.packed_linear import multiply, pack_dense
from compress.quantization import rtn
from compress.quantization.configs import RtnConfig
from compress.runtime.native_weights import repack
from compress.schemes import FIXED_SCHEMES
from compress.types import IntScheme

SHAPE = (2048, 8192)
CACHE_BYTES = 96_000_000
SCHEMES = {
    **{f"int{bits}": IntScheme(bits, 128) for bits in (8, 6, 5, 4, 3, 2)},
    **{name: FIXED_SCHEMES[name] for name in ("FP8_DYNAMIC", "FP8_BLOCK", "MXFP8A16", "NVFP4A16", "MXFP4A16", "NF4")},
    "ternary": IntScheme(2, None),
}


def weights() -> dict[str, tuple[list[Any], bool]]:
    """By name: copies of one random weight, and whether inputs are in 8 bits."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.02
    found: dict[str, tuple[list[Any], bool]] = {}
    for name, scheme in SCHEMES.items():
        quantized = rtn.transform(weight, scheme, RtnConfig(scale_search=False), torch.bfloat16)
        made = [repack(quantized)]
        made += [repack(quantized) for _ in range(math.ceil(CACHE_BYTES / made[0].nbytes) - 1)]
        if isinstance(scheme, IntScheme):
            found[f"{name} x int8"] = (made, True)
        found[f"{name} x float32"] = (made, False)
    dense = weight.bfloat16()
    found["bfloat16 x float32"] = ([pack_dense(dense) for _ in range(math.ceil(CACHE_BYTES / dense.nbytes))], False)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found, x = weights(), torch.randn(arguments.tokens, SHAPE[1])
    before = machine.wait_until_quiet(30, watch=0.5)
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(arguments.rounds):
        for name, (copies, eight_bit) in found.items():
            for linear in copies:
                started = time.perf_counter()
                multiply(linear, x, eight_bit)
                seconds[name].append(time.perf_counter() - started)
    print("| weight x inputs | GB/s, fastest (median) | products per second over int8 x int8's |\n|---|---|---|")
    results = {}
    for name, (copies, _) in found.items():
        fastest, usual = min(seconds[name]), statistics.median(seconds[name])
        rates = [copies[0].nbytes / taken / 1e9 for taken in (fastest, usual)]
        share = min(seconds["int8 x int8"]) / fastest
        results[name] = {
            "gigabytes_per_second": [round(rate, 2) for rate in rates],
            "speed_over_int8": round(share, 2),
            "bits_per_weight": round(8 * copies[0].nbytes / math.prod(SHAPE), 3),
        }
        print(f"| {name} | {rates[0]:.1f} ({rates[1]:.1f}) | {share:.2f} |", flush=True)
    if arguments.json:
        record = {
            "machine": machine.facts(), "versions": machine.versions("compress", "torch"), "shape": SHAPE,
            "tokens": arguments.tokens, "threads": arguments.threads,
            "others_busy_cores_before": round(before, 3), "results": results,
        }  # fmt: skip
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

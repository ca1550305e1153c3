"""Parity and speed of the Triton kernels on the GPU at hand; writes benchmarks/results/gpu-DEVICE-DATE.json.

    python -m benchmarks.gpu_check [--json FILE]      on a machine with a CUDA device
    python -m benchmarks.gpu_check --dry              tiny shapes in Triton's interpreter, nothing timed or written

Speed: all linears of one 8B-shaped layer, copies of them rotated through more than twice the L2 cache inside one CUDA
graph; an FP8 product at 512 and 2048 tokens; each against torch in bfloat16 in the same run. Then the engine's whole
decode of an 8B shape, 1 to 32 answers at once, 4-bit weights against bfloat16 under the same CUDA graphs. Weights are
random: speeds only. What issue 6 asks for stands beside each figure.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__" and "--dry" in sys.argv and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from torch import Tensor
from torch.nn import functional

from benchmarks.gpu_engine import decode
from benchmarks.gpu_shapes import DRY, LLAMA_8B, Linear, Shape
from benchmarks.gpu_timing import Clock, ratio, summary
from benchmarks.machine import facts, versions
from compress.kernels import gpu_linear
from compress.schemes import FIXED_SCHEMES
from compress.types import BlockFloatScheme, Fp8Scheme, IntScheme, QuantizedTensor, Scheme

RESULTS = Path(__file__).parent / "results"
SCHEMES: dict[str, Scheme] = {
    **{f"W{bits}A16-g128": IntScheme(bits, 128) for bits in (2, 3, 4, 8)},
    **{name: FIXED_SCHEMES[name] for name in ("W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16", "MXFP8A16")},
}
WANTED = {"w4_over_bf16": 3.0, "w4_share_of_copy": 0.75, "fp8_512": 1.2, "fp8_2048": 1.5, "decode": 2.5}


def random_weight(rows: int, columns: int, scheme: Scheme, device: torch.device) -> QuantizedTensor:
    """Random codes on grids that keep products in range."""
    if isinstance(scheme, IntScheme):
        codes = torch.randint(scheme.qmin, scheme.qmax + 1, (rows, columns), dtype=torch.int8, device=device)
        scale = torch.rand(rows, scheme.groups(columns), device=device) * 0.001 + 0.0005
        return QuantizedTensor(codes, scale if scheme.inputs else scale.bfloat16(), None, scheme)
    values = torch.randn(rows, columns, device=device)
    if isinstance(scheme, Fp8Scheme):
        scale = torch.full(scheme.scale_shape(rows, columns), 0.001, device=device)
        return QuantizedTensor((30 * values).to(torch.float8_e4m3fn), scale, None, scheme)
    assert isinstance(scheme, BlockFloatScheme)
    groups = (rows, scheme.groups(columns))
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device=device)
    codes = (4 * values).to(torch.float8_e4m3fn) if scheme.bits == 8 else codes
    if scheme.scale_type == "e8m0":
        return QuantizedTensor(codes, torch.full(groups, 119, dtype=torch.uint8, device=device), None, scheme)
    scale = torch.rand(groups, device=device).add(1).to(torch.float8_e4m3fn)
    return QuantizedTensor(codes, scale, None, scheme, torch.tensor([100.0], device=device))


def packed_linear(rows: int, columns: int, scheme: Scheme, device: torch.device) -> tuple[Linear, int]:
    """A random linear, packed, and the bytes that a product reads of it."""
    packed, _ = gpu_linear.pack(random_weight(rows, columns, scheme, device), None, None)
    return (lambda x: gpu_linear.multiply(packed, x)), packed.nbytes


def dense_linear(rows: int, columns: int, device: torch.device) -> tuple[Linear, int]:
    """The same for torch in bfloat16."""
    weight = (torch.randn(rows, columns, device=device) * 0.02).bfloat16()
    return (lambda x: functional.linear(x, weight)), 2 * weight.numel()


def layer(shape: Shape, scheme: Scheme | None, tokens: int, clock: Clock) -> tuple[list[float] | None, int]:
    """(seconds of one pass over a layer's linears, bytes of weights read in it)."""
    copies: list[list[tuple[Linear, Tensor]]] = []
    read = total = 0
    while total <= 2 * clock.l2_bytes() or len(copies) < 2:
        one = []
        read = 0
        for rows, columns in shape.linears().values():
            make = dense_linear(rows, columns, clock.device) if scheme is None else None
            linear, size = make or packed_linear(rows, columns, scheme, clock.device)  # type: ignore[arg-type]
            one.append((linear, torch.randn(tokens, columns, device=clock.device).bfloat16()))
            read += size
        copies.append(one)
        total += read
    taken = clock.seconds(lambda: [linear(x) for copy in copies for linear, x in copy])
    return (None if taken is None else [one / len(copies) for one in taken]), read


def parity(shape: Shape, clock: Clock) -> dict[str, dict[str, float]]:
    """Largest error of each scheme's product over the outputs' root mean square, by number of tokens."""
    from compress.formats.inputs import round_inputs

    found: dict[str, dict[str, float]] = {}
    rows, columns = (64, 128) if clock.dry else shape.linears()["o"]
    for name, scheme in SCHEMES.items():
        weight = random_weight(rows, columns, scheme, clock.device)
        packed, rounds = gpu_linear.pack(weight, None, None)
        host = QuantizedTensor(
            weight.codes.cpu(), weight.scale.cpu(), None, scheme,
            None if weight.divisor is None else weight.divisor.cpu(),
        )  # fmt: skip
        dense = host.dequantize().double().to(clock.device)
        found[name] = {}
        for tokens in (1, 3) if clock.dry else (1, 2, 16, 17, 128, 512):
            x = torch.randn(tokens, columns, device=clock.device).bfloat16()
            entered = round_inputs(x.float(), scheme.inputs) if rounds and scheme.inputs is not None else x
            wanted = entered.double() @ dense.T
            error = (gpu_linear.multiply(packed, x).double() - wanted).abs().max() / wanted.square().mean().sqrt()
            found[name][str(tokens)] = float(error)
            if (
                not error < 0.06
            ):  # a bfloat16 result rounds to 2^-9 of itself, and the largest is several times the mean
                raise SystemExit(f"error: {name} at {tokens} tokens is off by {float(error):.1e}")
    return found


def measure(clock: Clock) -> dict[str, Any]:
    """Every section of the record."""
    shape = DRY if clock.dry else LLAMA_8B
    record: dict[str, Any] = {"parity": parity(shape, clock), "wanted": WANTED}
    bandwidth = clock.copy_bandwidth()
    record["copy_bytes_per_second"] = bandwidth
    record["layer"] = {}
    for tokens in (1, 2) if clock.dry else (1, 2, 4, 8, 16, 32, 64, 512):
        dense, _ = layer(shape, None, tokens, clock)
        row: dict[str, Any] = {"bfloat16": summary(dense)}
        for name, scheme in SCHEMES.items():
            taken, read = layer(shape, scheme, tokens, clock)
            median = None if taken is None else sorted(taken)[len(taken) // 2]
            row[name] = {
                "time": summary(taken),
                "times_faster_than_bfloat16": ratio(dense, taken),
                "weight_bytes": read,
                "share_of_copy_bandwidth": None if median is None or not bandwidth else read / median / bandwidth,
            }
        record["layer"][str(tokens)] = row
    record["fp8"] = {}
    for tokens in (2,) if clock.dry else (512, 2048, 4096):
        dense, _ = layer(shape, None, tokens, clock)
        taken, _ = layer(shape, FIXED_SCHEMES["FP8_DYNAMIC"], tokens, clock)
        record["fp8"][str(tokens)] = {"bfloat16": summary(dense), "fp8": summary(taken), "faster": ratio(dense, taken)}
    record["engine"] = decode(shape, clock)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny shapes, nothing timed")
    parser.add_argument("--require-gpu", action="store_true", help="say whether there is a GPU, and stop")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    gpu = torch.cuda.is_available()
    if not gpu and not given.dry:
        raise SystemExit(
            "error: torch sees no CUDA device\nhint: `python -m benchmarks.gpu_check --dry` tries the script"
        )
    if given.require_gpu:
        return
    torch.manual_seed(0)
    clock = Clock(torch.device("cuda" if gpu and not given.dry else "cpu"), given.dry)
    record = {
        "machine": facts(),
        "device": "interpreter: numbers only, nothing is timed" if given.dry else torch.cuda.get_device_name(),
        "versions": versions("compress", "torch", "triton") | {"cuda": torch.version.cuda},
        **measure(clock),
    }
    text = json.dumps(record, indent=1) + "\n"
    if given.json is None and not given.dry:
        place = re.sub(r"[^a-z0-9]+", "-", str(record["device"]).lower()).strip("-")
        given.json = RESULTS / f"gpu-{place}-{str(facts()['date'])[:10]}.json"
    if given.json is not None:
        given.json.write_text(text)
    print(text)


if __name__ == "__main__":
    main()

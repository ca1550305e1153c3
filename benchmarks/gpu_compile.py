"""Compiles every Triton kernel ahead of time, no GPU needed, and reports registers, spills and shared memory.

    python -m benchmarks.gpu_compile --capability 80 90 100 [--only TEXT] [--json FILE]

ptxas is the one in the triton package. Says nothing of speed; a spill (bytes written to and read from local memory in a
thread's life) says that a block is too large for its warps.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

from compress.kernels.triton import linear, packing
from compress.kernels.triton.attention import attention_kernel, queries_of
from compress.kernels.triton.cache import PAGE, write_kernel
from compress.kernels.triton.configs import Config, entries
from compress.kernels.triton.dense import CHUNK, dense_kernel
from compress.kernels.triton.fused import gate_kernel, norm_kernel, turn_kernel
from compress.kernels.triton.gemm import gemm_kernel
from compress.kernels.triton.gemv import gemv_kernel
from compress.kernels.triton.packing import PackedWeight
from compress.kernels.triton.paged import join_kernel, paged_kernel
from compress.kernels.triton.rounded import rounded_kernel
from compress.kernels.triton.rounding import round_kernel
from compress.kernels.triton.softmax import launch_of
from compress.kernels.triton.splits import finish_kernel
from compress.schemes import FIXED_SCHEMES
from compress.types import BlockFloatScheme, IntScheme, QuantizedTensor, Scheme


@dataclass(frozen=True)
class Case:
    """One kernel with the types of its pointers, its constants, and how it is launched."""

    name: str
    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    floats: tuple[str, ...] = ()
    least_capability: int = 80


POINTERS = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int8: "i8", torch.int16: "i16",
    torch.int32: "i32", torch.uint8: "u8",
}  # fmt: skip
INPUTS = {"bf16": 16, "fp16": 16, "fp32": 32}
"""Dtypes of what a model computes in, and their bits."""
SCHEMES: dict[str, Scheme] = {
    **{
        f"w{bits}-g{group or 'channel'}{'' if symmetric else '-asym'}": IntScheme(bits, group, symmetric)
        for bits in (2, 3, 4, 8)
        for group, symmetric in ((128, True), (32, False), (None, True))
    },
    **{name.removesuffix("A16").lower(): FIXED_SCHEMES[name] for name in ("NVFP4A16", "MXFP4A16", "MXFP8A16")},
}


def packed_weight(scheme: Scheme) -> PackedWeight:
    """A weight of zeros as the runtime packs it."""
    rows, columns, zeros = 16, 1024, None
    assert isinstance(scheme, (IntScheme, BlockFloatScheme))
    codes, scale = torch.zeros(rows, columns, dtype=torch.int8), torch.ones(rows, scheme.groups(columns))
    if isinstance(scheme, IntScheme):
        zeros = None if scheme.symmetric else torch.zeros(scale.shape, dtype=torch.int8)
        return packing.pack(QuantizedTensor(codes, scale.bfloat16(), zeros, scheme))
    steps = scale.to(torch.float8_e4m3fn) if scheme.scale_type == "e4m3" else scale.to(torch.uint8)
    divisor = torch.ones(1) if scheme.scale_type == "e4m3" else None
    return packing.pack(QuantizedTensor(codes.view(torch.uint8), steps, None, scheme, divisor))


def packed_cases() -> Iterator[Case]:
    """Both products of every width in both layouts of scales, with the blocks that the table has for each dtype."""
    for name, scheme in SCHEMES.items():
        weight = packed_weight(scheme)
        parts = {part: getattr(weight, part) for part in ("words", "high", "scale", "zero", "divisor")}
        stored = {part: POINTERS[tensor.dtype] for part, tensor in parts.items() if tensor is not None}
        for x, inputs in INPUTS.items():
            if x == "fp16" and name not in ("w4-g128", "w3-g128", "nvfp4"):
                continue  # what it is decoded to differs from bfloat16 by one conversion
            for operation in ("gemv", "gemm"):
                for entry in entries(operation, "any", weight.bits, inputs):  # type: ignore[arg-type]
                    yield from _packed(name, x, operation, entry, weight, stored)
    yield Case("finish", finish_kernel, {"partial": "fp32", "bias": "bf16", "out": "bf16"}, {"BLOCK": 1024})


def _packed(
    name: str, x: str, operation: str, entry: dict[str, Any], weight: PackedWeight, stored: dict[str, str]
) -> Iterator[Case]:
    cut = Config(entry["block_rows"], entry.get("block_tokens", 1), 1, entry["warps"], entry["stages"])
    fixed = linear.constants(weight, cut)
    warps, stages = int(fixed.pop("num_warps")), int(fixed.pop("num_stages"))
    pointers, of = {"x": x, "out": x, **stored}, "" if x == "bf16" else f" {x}"
    if operation == "gemm":
        fixed["BLOCK_TOKENS"] = cut.block_tokens
        blocks = f"{cut.block_rows}x{cut.block_tokens}"
        yield Case(f"gemm {name}{of} {blocks}", gemm_kernel, pointers, fixed, warps, stages)
        if x == "bf16":
            experts = {**pointers, "blocks": "i32", "order": "i32"}
            yield Case(f"gemm {name} of experts {blocks}", gemm_kernel, experts, fixed, warps, stages)
        return
    yield Case(f"gemv {name}{of} {cut.block_rows}", gemv_kernel, pointers, fixed, warps, stages)
    experts = {**pointers, "experts": "i32"}
    yield Case(f"gemv {name}{of} of experts {cut.block_rows}", gemv_kernel, experts, fixed, warps, stages)


def rounded_cases() -> Iterator[Case]:
    """Products with rounded inputs, FP8 both as it is and as bytes, and the rounding."""
    for codes, kind, least in (("int8", "i8", 80), ("bytes", "u8", 80), ("fp8", "fp8e4nv", 90)):
        for tiles in (False,) if codes == "int8" else (False, True):
            for entry in entries("rounded", "any", 8, 8):
                blocks = {"BLOCK_ROWS": entry["block_rows"], "BLOCK_TOKENS": entry["block_tokens"]}
                yield Case(
                    f"rounded {codes}{' tiles' if tiles else ''} {'x'.join(map(str, blocks.values()))}",
                    rounded_kernel,
                    {"x": kind, "weight": kind, "x_scale": "fp32", "weight_scale": "fp32", "out": "bf16"},
                    {"CODES": codes, "TILES": tiles, "ROW_SCALES": not tiles, **blocks},
                    entry["warps"],
                    entry["stages"],
                    least_capability=least,
                )
    for fp8, span, warps in ((False, 4096, 4), (True, 4096, 4), (True, 128, 1), (False, 16384, 16)):
        steps = 448.0 if fp8 else 127.5
        pointers = {"x": "bf16", "codes": "u8" if fp8 else "i8", "scale": "fp32"}
        constants = {"STEPS": steps, "FP8": fp8, "SPAN": span}
        yield Case(f"round {'fp8' if fp8 else 'int8'} {span}", round_kernel, pointers, constants, warps)


def dense_cases() -> Iterator[Case]:
    """Products of dense weights, cut alike for any number of tokens."""
    for x, bits in INPUTS.items():
        (entry,) = entries("dense", "any", bits, bits)
        blocks = {"BLOCK_ROWS": entry["block_rows"], "BLOCK_TOKENS": entry["block_tokens"]}
        pointers, constants = {"x": x, "weight": x, "out": x}, {"CHUNK": CHUNK, **blocks}
        yield Case(f"dense {x}", dense_kernel, pointers, constants, entry["warps"], entry["stages"])


def fused_cases() -> Iterator[Case]:
    """Norms, rotation and gates at the sizes of an 8B model."""
    for x in ("bf16", "fp32"):
        of = "" if x == "bf16" else f" {x}"
        norm = {"x": x, "residual": x, "weight": x, "out": x}
        yield Case(f"norm{of} 4096", norm_kernel, norm, {"OFFSET": 0.0, "SPAN": 4096}, 8, floats=("epsilon",))
        turn = {"x": x, "cos": "fp32", "sin": "fp32"}
        for name, norms in (("turn 128", {}), ("turn 128 normed", {"norms": x})):
            constants = {"OFFSET": 0.0, "DIM": 128, "HALF": 64, "SPAN": 64}
            yield Case(f"{name}{of}", turn_kernel, turn | norms, constants, 1, floats=("epsilon",))
        for activation in ("silu", "gelu", "gelu_pytorch_tanh"):
            pointers, constants = {"gate": x, "up": x, "out": x}, {"ACTIVATION": activation, "BLOCK": 1024}
            yield Case(f"gate {activation}{of}", gate_kernel, pointers, constants)


def attention_cases() -> Iterator[Case]:
    """Attention of chunks and of single tokens over every kind of page: heads of 64 to 256, 96 among them, and what
    float32 and float16 have of their own."""
    kinds = {"plain": ("", ""), "int8": ("i8", "fp32"), "int4": ("u8", "bf16"), "fp8": ("u8", "fp32")}
    for x, dims in (("bf16", (64, 96, 128, 256)), ("fp32", (64, 128, 256)), ("fp16", (128,))):
        for dim in dims:
            for kind, (stored, scale) in kinds.items():
                of = "" if x == "bf16" else f" {x}"
                pages = {"keys": stored or x, "values": stored or x}
                pages |= {"key_scale": scale, "value_scale": scale} if scale else {}
                sizes = {"KIND": kind, "DIM": dim, "SPAN": triton.next_power_of_2(dim), "PAGE": PAGE}
                yield from _attention(f"{kind} {dim}{of}", x, pages, sizes, kind == "plain" and x == "bf16")
                written = {"k": x, "v": x, "slots": "i32", **pages}
                yield Case(f"write {kind} {dim}{of}", write_kernel, written, sizes, 1)
    parts = {"part": "fp32", "most": "fp32", "weight": "fp32", "out": "bf16"}
    for dim in (128, 256):
        yield Case(f"join {dim}", join_kernel, parts, {"DIM": dim, "SPAN": dim}, 1)


def _attention(
    name: str, x: str, pages: dict[str, str], sizes: dict[str, Any], windows: bool
) -> Iterator[Case]:  # fmt: skip
    dtype = next(dtype for dtype, kind in POINTERS.items() if kind == x)
    warps, stages = launch_of(dtype, sizes["DIM"]).values()
    for window, softcap in ((0, 0.0), (4096, 50.0)) if windows else ((0, 0.0),):
        seen = {**sizes, "WINDOW": window, "SOFTCAP": softcap}
        chunk = {"q": x, **pages, "tables": "i32", "blocks": "i32", "out": x}
        constants = {**seen, "BLOCK_QUERIES": queries_of(dtype, sizes["DIM"])}
        said = f"{name} window {window}" if window else name
        yield Case(f"attention {said}", attention_kernel, chunk, constants, warps, stages, floats=("scale",))
        paged, constants = (
            {"q": x, **pages, "tables": "i32", "lengths": "i32"},
            {**seen, "SHARED": 4, "BLOCK_HEADS": 16},
        )
        yield Case(f"paged {said}", paged_kernel, {**paged, "out": x}, constants, warps, stages, floats=("scale",))
        shares = {**paged, "out": "fp32", "most": "fp32", "weight": "fp32"}
        yield Case(f"paged {said} in splits", paged_kernel, shares, constants, warps, stages, floats=("scale",))


def cases() -> list[Case]:
    """Every kernel, in the ways in which the runtime launches it."""
    return [*packed_cases(), *rounded_cases(), *dense_cases(), *fused_cases(), *attention_cases()]


def compiled(case: Case, capability: int) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory and the size of the code of one kernel."""
    names = case.kernel.arg_names
    pointers = {f"{name}_ptr": f"*{kind}" for name, kind in case.pointers.items()}
    constants = dict(case.constants) | {n: None for n in names if n.endswith("_ptr") and n not in pointers}
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "fp32" if name in case.floats else "i32")
        for name in names
    }
    even = [name for name in names if name in pointers or name in ("rows", "columns")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in even}
    made = triton.compile(
        ASTSource(case.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": case.warps, "num_stages": case.stages},
    )
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "kernel.ptx"
        source.write_text(made.asm["ptx"])
        log = subprocess.run(
            [get_ptxas(capability).path, "-v", f"--gpu-name={sm_arch_from_capability(capability)}", str(source),
             "-o", os.devnull],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    registers = re.search(r"Used (\d+) registers", log)
    assert registers is not None, log
    return {
        "kernel": case.name,
        "architecture": f"sm_{capability}",
        "registers": int(registers.group(1)),
        "spilled_bytes": sum(map(int, spills)),
        "shared_bytes": made.metadata.shared,
        "warps": case.warps,
        "code_bytes": len(made.asm["cubin"]),
    }


def versions(capabilities: list[int]) -> dict[str, str]:
    """Of the compilers; the assembler may differ from one generation to the next."""
    assemblers = {f"ptxas for sm_{capability}": get_ptxas(capability).version for capability in capabilities}
    return {"triton": triton.__version__, **assemblers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, choices=(80, 90, 100), nargs="+", required=True)
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels with this in their name")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = []
    for capability in given.capability:
        for case in cases():
            if case.least_capability > capability or given.only not in case.name:
                continue
            row = compiled(case, capability)
            found.append(row)
            print(
                f"{row['architecture']} {row['kernel']:40} {row['registers']:4} registers {row['spilled_bytes']:6} "
                f"spilled {row['shared_bytes']:7} shared {row['warps']:3} warps",
                flush=True,
            )
    if given.json:
        record = {
            "command": " ".join(["python -m benchmarks.gpu_compile", *sys.argv[1:]]),
            "date": datetime.now(UTC).date().isoformat(),
            "versions": versions(given.capability),
            "rows": found,
        }
        given.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

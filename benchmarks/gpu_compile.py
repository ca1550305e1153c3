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
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

from compress.kernels.triton.attention import attention_kernel
from compress.kernels.triton.cache import write_kernel
from compress.kernels.triton.configs import table
from compress.kernels.triton.fused import gate_kernel, norm_kernel, turn_kernel
from compress.kernels.triton.gemm import finish_kernel, gemm_kernel
from compress.kernels.triton.gemv import gemv_kernel
from compress.kernels.triton.paged import join_kernel, paged_kernel
from compress.kernels.triton.rounded import rounded_kernel
from compress.kernels.triton.rounding import round_kernel


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
    extra: dict[str, Any] = field(default_factory=dict)


def packed_cases() -> Iterator[Case]:
    """Both products of every width in both layouts of scales, with the blocks of the table."""
    kinds: list[tuple[str, int, str, str, int, bool]] = [
        (f"w{bits}-g{group or 'channel'}{'-asym' if zero else ''}", bits, "int", "float", group, zero)
        for bits in (2, 3, 4, 8)
        for group, zero in ((128, False), (32, True), (0, False))
    ]
    kinds += [("nvfp4", 4, "fp4", "e4m3", 16, False), ("mxfp4", 4, "fp4", "e8m0", 32, False)]
    kinds += [("mxfp8", 8, "fp8", "e8m0", 32, False)]
    for name, bits, codes, scales, group, zero in kinds:
        low = 2 if bits == 3 else bits
        chunk = 512 // low
        planes = 32 // low if group % chunk == 0 else group // 16
        stored = {"words": "i32", "scale": "bf16" if scales == "float" else "u8"}
        stored |= ({"high": "i16"} if bits == 3 else {}) | ({"zero": "i8"} if zero else {})
        stored |= {"divisor": "fp32"} if scales == "e4m3" else {}
        constants = {
            "CODES": codes, "SCALE_KIND": scales, "BITS": bits, "FIELD": low, "GROUP": group, "PLANES_PER_SCALE": planes
        }  # fmt: skip
        for entry in _entries(bits):
            blocks = {"BLOCK_ROWS": entry["block_rows"]}
            blocks |= {"BLOCK_TOKENS": entry["block_tokens"]} if entry["operation"] == "gemm" else {}
            yield Case(
                f"{entry['operation']} {name} {'x'.join(str(size) for size in blocks.values())}",
                gemv_kernel if entry["operation"] == "gemv" else gemm_kernel,
                {"x": "bf16", "out": "bf16", **stored},
                {**constants, **blocks},
                entry["warps"],
                entry["stages"],
            )
            if entry["operation"] == "gemv":
                yield Case(
                    f"gemv {name} of experts {entry['block_rows']}",
                    gemv_kernel,
                    {"x": "bf16", "out": "bf16", "experts": "i32", **stored},
                    {**constants, **blocks},
                    entry["warps"],
                    entry["stages"],
                )
    yield Case("finish", finish_kernel, {"partial": "fp32", "bias": "bf16", "out": "bf16"}, {"BLOCK": 1024})


def rounded_cases() -> Iterator[Case]:
    """Products with rounded inputs, FP8 both as it is and as bytes, and the rounding."""
    for codes, kind, least in (("int8", "i8", 80), ("bytes", "u8", 80), ("fp8", "fp8e4nv", 90)):
        for tiles in (False,) if codes == "int8" else (False, True):
            for entry in table()["entries"]:
                if entry["operation"] == "rounded":
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


def fused_cases() -> Iterator[Case]:
    """Norms, rotation and gates at the sizes of an 8B model."""
    norm = {"x": "bf16", "residual": "bf16", "weight": "bf16", "out": "bf16"}
    yield Case("norm 4096", norm_kernel, norm, {"OFFSET": 0.0, "SPAN": 4096}, 8, floats=("epsilon",))
    turn = {"x": "bf16", "cos": "fp32", "sin": "fp32"}
    for name, norms in (("turn 128", {}), ("turn 128 normed", {"norms": "bf16"})):
        constants = {"OFFSET": 0.0, "DIM": 128, "HALF": 64, "SPAN": 64}
        yield Case(name, turn_kernel, turn | norms, constants, 1, floats=("epsilon",))
    for activation in ("silu", "gelu", "gelu_pytorch_tanh"):
        pointers = {"gate": "bf16", "up": "bf16", "out": "bf16"}
        yield Case(f"gate {activation}", gate_kernel, pointers, {"ACTIVATION": activation, "BLOCK": 1024})


def attention_cases() -> Iterator[Case]:
    """Attention of chunks and of single tokens with heads of 64 and 128, over every kind of page."""
    for dim in (64, 128):
        for kind, stored, scale in (("plain", "bf16", ""), ("int8", "i8", "fp32"), ("int4", "u8", "bf16"),
                                    ("fp8", "u8", "fp32")):  # fmt: skip
            pages = {"keys": stored, "values": stored}
            pages |= {"key_scale": scale, "value_scale": scale} if scale else {}
            sizes = {"KIND": kind, "DIM": dim, "SPAN": dim, "PAGE": 32}
            for window, softcap in ((0, 0.0), (4096, 50.0)) if kind == "plain" else ((0, 0.0),):
                chunk = {"q": "bf16", **pages, "tables": "i32", "blocks": "i32", "out": "bf16"}
                constants = {**sizes, "WINDOW": window, "SOFTCAP": softcap, "BLOCK_QUERIES": 64}
                name = f"attention {kind} {dim} window {window}"
                yield Case(name, attention_kernel, chunk, constants, 4, 2, floats=("scale",))
            paged = {"q": "bf16", **pages, "tables": "i32", "lengths": "i32"}
            paged |= {"out": "fp32", "most": "fp32", "weight": "fp32"}
            constants = {**sizes, "SHARED": 4, "WINDOW": 0, "SOFTCAP": 0.0, "BLOCK_HEADS": 16}
            yield Case(f"paged {kind} {dim}", paged_kernel, paged, constants, 4, 2, floats=("scale",))
            written = {"k": "bf16", "v": "bf16", "slots": "i32", **pages}
            yield Case(f"write {kind} {dim}", write_kernel, written, sizes, 1)
    parts = {"part": "fp32", "most": "fp32", "weight": "fp32", "out": "bf16"}
    yield Case("join 128", join_kernel, parts, {"DIM": 128, "SPAN": 128}, 1)


def _entries(bits: int) -> list[dict[str, Any]]:
    """The table's entries that products of this width get, those behind an entry for all numbers of tokens left out."""
    found = []
    for operation in ("gemv", "gemm"):
        for entry in table()["entries"]:
            if entry["operation"] == operation and entry.get("bits", bits) == bits:
                found.append(entry)
                if "most_tokens" not in entry:
                    break
    return found


def cases() -> list[Case]:
    """Every kernel, in the ways in which the runtime launches it."""
    return [*packed_cases(), *rounded_cases(), *fused_cases(), *attention_cases()]


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

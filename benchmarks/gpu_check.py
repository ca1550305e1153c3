"""Parity and speed of the Triton kernels on the GPU at hand; writes benchmarks/results/gpu-DEVICE-DATE.json.

    python -m benchmarks.gpu_check [--sections parity,layer,fp8,engine] [--json FILE]    on a machine with a CUDA device
    python -m benchmarks.gpu_check --dry                 tiny shapes in Triton's interpreter, nothing timed or written

parity: products of every scheme and attention over every kind of cache at an 8B model's sizes. layer, fp8: all linears
of one 8B-shaped layer at 1 to 512 tokens, FP8 at 512 to 4096, rotated through more than twice the L2 cache. engine: the
whole decode of an 8B shape, 1 to 32 answers at once, 4-bit weights against bfloat16 under the same CUDA graphs. Weights
are random: speeds only. The file is written again whenever it grows, and sections that an earlier call of the same day
wrote stay. A section that fails is recorded as an error. Exit status 1: one failed, or a figure misses its bar.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__" and "--dry" in sys.argv and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from benchmarks import gpu_attention, gpu_engine, gpu_products
from benchmarks.gpu_bars import bars
from benchmarks.gpu_products import Save
from benchmarks.gpu_shapes import DRY, LLAMA_8B, Shape
from benchmarks.gpu_timing import Clock
from benchmarks.machine import facts, versions
from compress.schemes import FIXED_SCHEMES

RESULTS = Path(__file__).parent / "results"
Section = Callable[[Shape, Clock, dict[str, Any], Save], None]


def parity(shape: Shape, clock: Clock, found: dict[str, Any], save: Save) -> None:
    """Of products and of attention."""
    for name, part in (("products", gpu_products.parity), ("attention", gpu_attention.parity)):
        found[name] = {}
        part(shape, clock, found[name], save)


def layer(shape: Shape, clock: Clock, found: dict[str, Any], save: Save) -> None:
    """Every scheme at few tokens and at a prompt's."""
    tokens = (1, 2) if clock.dry else (1, 2, 4, 8, 16, 32, 64, 512)
    gpu_products.speed(shape, gpu_products.SCHEMES, tokens, clock, found, save)


def fp8(shape: Shape, clock: Clock, found: dict[str, Any], save: Save) -> None:
    """FP8 of every granularity at a prompt's tokens."""
    schemes = {name: FIXED_SCHEMES[name] for name in ("FP8_DYNAMIC", "FP8_BLOCK")}
    gpu_products.speed(shape, schemes, (2,) if clock.dry else (512, 2048, 4096), clock, found, save)


SECTIONS: dict[str, Section] = {"parity": parity, "layer": layer, "fp8": fp8, "engine": gpu_engine.decode}


def measure(names: list[str], clock: Clock, record: dict[str, Any], save: Save) -> None:
    """Sections of the record, one after the other, whatever becomes of the others."""
    for name in names:
        found = record["sections"][name] = {"date": facts()["date"]}
        try:
            SECTIONS[name](DRY if clock.dry else LLAMA_8B, clock, found, save)
        except Exception as error:
            traceback.print_exc()
            found["error"] = f"{type(error).__name__}: {str(error).strip() or 'without a word'}"
        save()


def failures(record: dict[str, Any]) -> list[str]:
    """What is wrong in a record, in words."""
    errors = [f"{name}: {found['error']}" for name, found in record["sections"].items() if "error" in found]
    for name, bar in record["bars"].items():
        if bar["met"] is False:
            figure = "not there" if bar["figure"] is None else f"{bar['figure']:.3g}"
            errors.append(f"{name} is {figure}, and {bar['wanted']} is wanted")
    return errors


def sections(text: str) -> list[str]:
    """Names with commas between them. ArgumentTypeError for one that is none."""
    names = text.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(SECTIONS)}")
    return names


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny shapes, nothing timed")
    parser.add_argument("--require-gpu", action="store_true", help="say whether there is a GPU, and stop")
    parser.add_argument("--sections", type=sections, default=list(SECTIONS), metavar="NAMES")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    if not gpu and not given.dry:
        raise SystemExit(
            "error: torch sees no CUDA device\nhint: `python -m benchmarks.gpu_check --dry` tries the script"
        )
    if given.require_gpu:
        return
    torch.manual_seed(0)
    clock = Clock(torch.device("cuda" if gpu and not given.dry else "cpu"), given.dry)
    device = "interpreter: numbers only, nothing is timed" if given.dry else torch.cuda.get_device_name()
    path = given.json
    if path is None and not given.dry:
        place = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        path = RESULTS / f"gpu-{place}-{str(facts()['date'])[:10]}.json"
    record: dict[str, Any] = {
        "machine": facts(),
        "device": device,
        "versions": versions("compress", "torch", "triton") | {"cuda": torch.version.cuda},
        "bars": {},
        "sections": json.loads(path.read_text())["sections"] if path is not None and path.exists() else {},
    }

    def save() -> None:
        record["bars"] = bars(record["sections"])
        if path is not None:
            path.write_text(json.dumps(record, indent=1) + "\n")

    measure(given.sections, clock, record, save)
    print(json.dumps(record, indent=1))
    if wrong := failures(record):
        raise SystemExit("\n".join(f"error: {one}" for one in wrong))


if __name__ == "__main__":
    main()

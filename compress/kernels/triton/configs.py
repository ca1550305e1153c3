"""Blocks of every product as data: `configs.json`, looked up once per shape, never searched for while a model runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any, Literal

import torch

Operation = Literal["gemv", "gemm", "rounded", "dense"]
SAME_TOKENS = 32
"""What a product of any number of tokens is cut for where none of its bits may depend on that number."""
_LEAST_CHUNKS = 4  # of a split: shorter ones cost more in sums than they win in programs


@dataclass(frozen=True, slots=True)
class Config:
    """How a product is cut: rows and tokens of a program, programs that share the columns, warps, pipeline stages."""

    block_rows: int
    block_tokens: int
    splits: int
    warps: int
    stages: int


@lru_cache(maxsize=4096)
def config(
    operation: Operation, device: torch.device, bits: int, tokens: int, rows: int, chunks: int, inputs: int
) -> Config:
    """The entry for a product of `tokens` x (rows, chunks of columns), whose inputs have so many bits.

    Columns are split where programs do not fill the device once, each multiprocessor with as many as an entry says are
    resident, and never so far that they would wait for a second turn.
    """
    name, count = _device(device)
    entry = next(
        entry for entry in entries(operation, name, bits, inputs) if tokens <= entry.get("most_tokens", tokens)
    )
    block_rows, block_tokens = entry["block_rows"], entry.get("block_tokens", 1)
    programs = -(-rows // block_rows) * -(-tokens // block_tokens)
    splits = max(1, min(count * entry["resident"] // programs, chunks // _LEAST_CHUNKS)) if "resident" in entry else 1
    return Config(block_rows, block_tokens, splits, entry["warps"], entry["stages"])


@lru_cache(maxsize=64)
def entries(operation: Operation, device: str, bits: int, inputs: int) -> list[dict[str, Any]]:
    """The table's entries for codes and inputs of so many bits, up to the first that takes any number of tokens."""
    found = []
    for entry in table()["entries"]:
        if (
            entry["operation"] == operation
            and entry["device"] in ("any", device)
            and entry.get("bits", bits) == bits
            and entry.get("inputs", inputs) == inputs
        ):
            found.append(entry)
            if "most_tokens" not in entry:
                break
    return found


@lru_cache(maxsize=1)
def table() -> dict[str, Any]:
    """The whole of `configs.json`."""
    text = (files("compress.kernels.triton") / "configs.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def units(device: torch.device) -> int:
    """Streaming multiprocessors; in the interpreter few, so that splits occur."""
    return _device(device)[1]


@lru_cache(maxsize=16)
def _device(device: torch.device) -> tuple[str, int]:
    """(`sm_90` and the like, streaming multiprocessors); in the interpreter `cpu`."""
    if device.type != "cuda":
        return "cpu", 2
    found = torch.cuda.get_device_properties(device)
    return f"sm_{found.major}{found.minor}", found.multi_processor_count

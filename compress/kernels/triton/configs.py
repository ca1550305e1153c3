"""Blocks of every product as data: `configs.json`, looked up once per shape, never searched for while a model runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any, Literal

import torch

Operation = Literal["gemv", "gemm", "rounded"]
_PROGRAMS_PER_UNIT = 4
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
    operation: Operation, device: torch.device, bits: int, tokens: int, rows: int, chunks: int, split: bool = True
) -> Config:
    """The entry for a product of `tokens` x (rows, chunks of columns)."""
    name, units = _device(device)
    entry = next(entry for entry in table()["entries"] if _fits(entry, name, operation, bits, tokens))
    block_rows, block_tokens = entry["block_rows"], entry.get("block_tokens", 1)
    programs = -(-rows // block_rows) * -(-tokens // block_tokens)
    wanted = entry.get("splits", -(-units * _PROGRAMS_PER_UNIT // programs))
    splits = max(1, min(wanted, chunks // _LEAST_CHUNKS)) if split else 1
    return Config(block_rows, block_tokens, splits, entry["warps"], entry["stages"])


@lru_cache(maxsize=1)
def table() -> dict[str, Any]:
    """The whole of `configs.json`."""
    text = (files("compress.kernels.triton") / "configs.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def _fits(entry: dict[str, Any], device: str, operation: str, bits: int, tokens: int) -> bool:
    return (
        entry["device"] in ("any", device)
        and entry["operation"] == operation
        and entry.get("bits", bits) == bits
        and tokens <= entry.get("most_tokens", tokens)
    )


@lru_cache(maxsize=16)
def _device(device: torch.device) -> tuple[str, int]:
    """(`sm_90` and the like, streaming multiprocessors); in the interpreter `cpu` and few, so that splits occur."""
    if device.type != "cuda":
        return "cpu", 2
    found = torch.cuda.get_device_properties(device)
    return f"sm_{found.major}{found.minor}", found.multi_processor_count

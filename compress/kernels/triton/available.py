"""Whether Triton kernels can run on a device, and if not, why; without importing triton."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

OLDEST = (8, 0)
"""Compute capability: bfloat16 on tensor cores."""
_MULTIPLIES_FP8 = (8, 9)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def obstacle(device: torch.device | str) -> str | None:
    """Why Triton kernels do not run on `device`; None if they do."""
    place = torch.device(device)
    if find_spec("triton") is None:
        return "triton is not installed"
    if place.type == "cpu":
        return None if interpreted() else "Triton kernels run on a GPU; on a CPU only with TRITON_INTERPRET=1, to check"
    if place.type != "cuda":
        return f"no Triton kernels for {place.type}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.hip is not None:
        return "this torch is for AMD GPUs, and the kernels were written and compiled for NVIDIA's alone"
    found = torch.cuda.get_device_capability(place)
    if found < OLDEST:
        return f"compute capability {found[0]}.{found[1]}; the kernels need {OLDEST[0]}.{OLDEST[1]}"
    return None


def multiplies_fp8(device: torch.device) -> bool:
    """Whether the device's tensor cores take FP8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _MULTIPLIES_FP8

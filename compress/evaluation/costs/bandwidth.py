"""How fast this machine reads memory at this moment: what decoding a large model cannot exceed."""

from __future__ import annotations

import time

import torch

BYTES = 512 * 2**20
"""More than any cache holds."""

SUMS = 5


def read_bandwidth(device: str = "cpu") -> float | None:
    """Bytes per second that summing a large array reads on `device`, with torch's threads: the best of five sums.

    None where there is no memory for the array.
    """
    rates = read_rates(device)
    return None if rates is None else max(rates)


def read_rates(device: str = "cpu") -> list[float] | None:
    """The same of each sum: the best is what the machine can do, the others are what it does besides other work."""
    cuda = device.startswith("cuda")
    try:
        data = torch.ones(BYTES // 4, dtype=torch.float32, device=device)
    except (RuntimeError, MemoryError):  # torch's out of memory is a RuntimeError
        return None
    rates = []
    for _ in range(SUMS):
        if cuda:
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        data.sum()
        if cuda:
            torch.cuda.synchronize(device)
        rates.append(data.nbytes / max(time.perf_counter() - started, 1e-9))
    return rates

"""Whether two dense models fit in memory: quantising streams blocks, but scoring holds models whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress.artifact.reader import Artifact

HEADROOM = 1_000_000_000  # logits of both models, and the interpreter


def scoring_memory(artifact: Artifact, device: str = "auto") -> int:
    """Bytes that scoring an artifact in lock-step with its parent takes: both dense, float32 on a CPU, else 16 bits."""
    width = 2 if _cuda(device) else 4
    return 2 * width * artifact.manifest.sizes.parameters + HEADROOM


def available_memory(device: str = "auto") -> int | None:
    """Bytes that can be had on the device without swapping; None where the system does not say."""
    if _cuda(device):
        import torch

        return int(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024 * kilobytes[0] if kilobytes else None


def _cuda(device: str) -> bool:
    if device == "cpu":
        return False
    import torch

    return torch.cuda.is_available()

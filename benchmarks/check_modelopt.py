"""Whether artifacts in ModelOpt's layout decode to the very numbers that nvidia-modelopt's own dequantiser gives.

    PYTHONPATH=$(ls -d ~/peer-modelopt/lib/python3*/site-packages) python benchmarks/check_modelopt.py ARTIFACT...

nvidia-modelopt (0.47.0) is installed without its dependencies in a directory of its own, and put behind this project's
packages. Compares every linear, bit for bit, in bfloat16; exits with 1 at the first that differs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from compress.formats.registry import FORMATS
from compress.models.checkpoint import Checkpoint
from compress.runtime.native_reader import packed_linears, stored_parts
from compress.types import BlockFloatScheme


def theirs(stored: Mapping[str, Tensor]) -> Tensor:
    """The weight (out, in) bfloat16 of one NVFP4 linear, by nvidia-modelopt."""
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    codes = stored["weight"]
    shape = torch.Size((codes.shape[0], 2 * codes.shape[1]))
    tensor: Any = NVFP4QTensor(shape, torch.bfloat16, codes.clone())
    decoded: Tensor = tensor.dequantize(
        scale=stored["weight_scale"],
        double_scale=stored["weight_scale_2"],
        block_sizes={-1: 16},
        dtype=torch.bfloat16,
    )
    return decoded


def main() -> None:
    for path in sys.argv[1:]:
        checkpoint = Checkpoint.open(path)
        format, schemes = packed_linears(checkpoint)
        if format is not FORMATS["modelopt"] or not all(isinstance(s, BlockFloatScheme) for s in schemes.values()):
            raise SystemExit(f"{path} is not NVFP4 in ModelOpt's layout")
        for name, scheme in schemes.items():
            stored = stored_parts(checkpoint, name, format)
            ours, other = format.weight(stored, scheme), theirs(stored)
            if ours.dtype != other.dtype or not torch.equal(ours, other):
                raise SystemExit(f"{path}: {name} differs from nvidia-modelopt {version('nvidia-modelopt')}")
        print(f"{path}: {len(schemes)} linears are those of nvidia-modelopt {version('nvidia-modelopt')}, bit for bit")


if __name__ == "__main__":
    main()

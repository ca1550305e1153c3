"""Quantise one model with HQQ; runs inside hqq's own environment, imports nothing of ours.

Settings are hqq's defaults (20 steps of its half-quadratic solver; zero points rounded at 4 bits), every linear but the
output head. The output is the source's checkpoint with the weights as hqq decodes them, in the source's dtype.

Prints one JSON object on its last line of stdout; `stored_bytes` is what hqq keeps of the linears (packed codes,
scales, zero points) and the other tensors as the source has them.

    PEER_PYTHON benchmarks/peer_hqq.py --model DIR --bits 4 --group-size 64 --output OUT
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from importlib.metadata import version
from pathlib import Path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--axis", type=int, choices=(0, 1), default=1, help="1: groups along inputs, as kernels want")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(arguments.threads)
    settings = BaseQuantizeConfig(nbits=arguments.bits, group_size=arguments.group_size, axis=arguments.axis)
    shutil.copytree(arguments.model, arguments.output)
    started, linear_bytes, other_bytes = time.perf_counter(), 0, 0
    for file in sorted(arguments.output.glob("*.safetensors")):
        stored = load_file(file)
        for name, weight in stored.items():
            if ".layers." not in name or weight.dim() != 2:
                other_bytes += weight.numel() * weight.element_size()
                continue
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
            linear.weight.data = weight
            packed = HQQLinear(linear, settings, compute_dtype=weight.dtype, device="cpu")
            for tensor in (packed.W_q, packed.meta["scale"], packed.meta["zero"]):
                linear_bytes += tensor.numel() * tensor.element_size()
            stored[name] = packed.dequantize().to(weight.dtype).reshape(weight.shape).contiguous()
        save_file(stored, file, {"format": "pt"})
    result = {"tool": "hqq", "version": version("hqq"), "algorithm_seconds": round(time.perf_counter() - started, 3)}
    sizes = {"linear_bytes": linear_bytes, "stored_bytes": linear_bytes + other_bytes}
    print("\n" + json.dumps(result | sizes), flush=True)


if __name__ == "__main__":
    main()

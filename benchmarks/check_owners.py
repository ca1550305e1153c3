r"""Whether artifacts in AutoAWQ's and GPTQ's layouts decode to the very numbers that their owners' dequantisers give.

    pip install --no-deps --no-build-isolation --target ~/peer-owners \
        autoawq==0.2.9 gptqmodel==7.7.0 pypcre logbar device-smi tokenicer defuser
    PYTHONPATH=~/peer-owners python benchmarks/check_owners.py ARTIFACT...

Without their dependencies, so that they run on this project's packages. AWQ by AutoAWQ's `dequantize_gemm`, GPTQ (both
versions) by gptqmodel's `TorchLinear`. Compares every linear, bit for bit, in float16; exits with 1 at the first that
differs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from compress.formats.registry import FORMATS
from compress.models.checkpoint import Checkpoint
from compress.runtime.native_reader import packed_linears, stored_parts
from compress.types import IntScheme

Theirs = Callable[[Mapping[str, Tensor], IntScheme], Tensor]


def by_autoawq(stored: Mapping[str, Tensor], scheme: IntScheme) -> Tensor:
    """The weight (out, in) float16 of one linear, by AutoAWQ."""
    from awq.utils.packing_utils import dequantize_gemm

    group_size = _group_size(scheme, stored["qweight"].shape[0])
    decoded: Tensor = dequantize_gemm(stored["qweight"], stored["qzeros"], stored["scales"], scheme.bits, group_size)
    return decoded.T


def by_gptqmodel(stored: Mapping[str, Tensor], scheme: IntScheme, written: str) -> Tensor:
    """The weight (out, in) float16 of one linear, by gptqmodel; written: `gptq` or `gptq_v2`, as its config says."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    width, out = len(stored["g_idx"]), stored["scales"].shape[1]
    module: Any = TorchLinear(scheme.bits, _group_size(scheme, width), scheme.symmetric, False, width, out)
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        getattr(module, name).data.copy_(stored[name])
    if written == "gptq":
        convert_gptq_v1_to_v2_format_module(module, scheme.bits, torch.int32)
    module.post_init()
    decoded: Tensor = module.dequantize_weight()
    return decoded.T


def _group_size(scheme: IntScheme, width: int) -> int:
    return width if scheme.group_size is None else scheme.group_size


def owner(checkpoint: Checkpoint) -> tuple[str, Theirs]:
    """The package that owns the checkpoint's layout, and how it decodes a linear."""
    found = checkpoint.config["quantization_config"]
    if found["quant_method"] == "awq":
        return "autoawq", by_autoawq
    written = found.get("checkpoint_format", "gptq")
    return "gptqmodel", lambda stored, scheme: by_gptqmodel(stored, scheme, written)


def main() -> None:
    for path in sys.argv[1:]:
        checkpoint = Checkpoint.open(path)
        format, schemes = packed_linears(checkpoint)
        if format not in (FORMATS["awq"], FORMATS["gptq"], FORMATS["gptq-v2"]):
            raise SystemExit(f"{path} is neither in AWQ's nor in GPTQ's layout")
        package, theirs = owner(checkpoint)
        for name, scheme in schemes.items():
            assert isinstance(scheme, IntScheme)
            stored = stored_parts(checkpoint, name, format)
            ours, other = format.weight(stored, scheme), theirs(stored, scheme)
            if ours.dtype != other.dtype or not torch.equal(ours, other):
                raise SystemExit(f"{path}: {name} differs from {package} {version(package)}")
        print(f"{path}: {len(schemes)} linears are those of {package} {version(package)}, bit for bit")


if __name__ == "__main__":
    main()

"""What this machine and this installation can do: versions, processor, kernels and their parity, packaged content."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

import torch

from compress import content
from compress.errors import CompressError
from compress.formats.inputs import round_inputs, static_scale
from compress.formats.int_packed import pack_bits
from compress.kernels import dispatch, gpu_linear, packed_linear
from compress.kernels.parity import error_of_largest
from compress.kernels.triton import available
from compress.models.checkpoint import Checkpoint
from compress.quantization import rtn
from compress.quantization.configs import RtnConfig
from compress.runtime import native_weights
from compress.runtime.loading import decide
from compress.schemes import FIXED_SCHEMES
from compress.types import IntScheme, QuantizedTensor, Scheme
from compress.workflows.memory import available_memory

PACKAGES = ("compress", "torch", "transformers", "compressed-tensors", "safetensors", "tokenizers", "numpy", "pydantic")
TOLERANCE = 1e-5  # relative to the largest output: float32 sums of some hundred products in another order
SCHEMES: dict[str, Scheme] = {f"W{bits}A16": IntScheme(bits, 128) for bits in (2, 3, 4, 8)} | FIXED_SCHEMES
"""Of which doctor says what multiplies them."""
EIGHT_BIT_TOLERANCE = 2e-2  # inputs rounded to one part in 254 of their block's largest


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `broken` says what kind of failure it is; None where all is well."""

    name: str
    detail: str
    broken: Literal["work", "integrity"] | None = None
    hint: str = ""


def examine() -> list[Check]:
    """All checks, in the order in which to read them. Takes a second; writes nothing."""
    return [*_versions(), *_machine(), *_kernels(), *_content()]


def _versions() -> Iterator[Check]:
    yield Check("python", f"{platform.python_version()} ({platform.python_implementation()})")
    for package in PACKAGES:
        try:
            yield Check(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            yield Check(package, "not installed", "work", f"pip install {package}")


def _machine() -> Iterator[Check]:
    memory = available_memory("cpu")
    free = "unknown" if memory is None else f"{memory / 1e9:.1f} GB"
    yield Check(
        "machine",
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{free} of memory free",
    )
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        yield Check("gpu", f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}")
    else:
        yield Check("gpu", "none that torch can use")


def _kernels() -> Iterator[Check]:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    try:
        for device in devices:
            for operation in dispatch.OPERATIONS:
                choice = dispatch.choose(operation, device)
                yield Check(f"kernel {operation} on {device}", f"{choice.name}: {choice.reason}")
        yield _product_parity()
        yield _same_bits()
        yield from cpu_products()
        yield from gpu_products()
    except CompressError as error:
        yield Check("native kernels", error.message, "work", error.hint)


def _product_parity() -> Check:
    """The runtime's products of repacked weights, exact and with 8-bit inputs, against their definition."""
    generator = torch.Generator().manual_seed(0)
    scheme = IntScheme(4, 64)
    codes = torch.randint(scheme.qmin, scheme.qmax + 1, (67, 256), dtype=torch.int8, generator=generator)
    scale = (torch.rand(67, 4, generator=generator) + 0.01).bfloat16()
    x = torch.randn(3, 256, generator=generator)
    exact = x.double() @ QuantizedTensor(codes, scale, None, scheme).dequantize().double().T
    linear = packed_linear.pack_codes(pack_bits(codes, scheme.bits), scale, None, 256, scheme)
    errors = [error_of_largest(packed_linear.multiply(linear, x, eight_bit), exact) for eight_bit in (False, True)]
    detail = f"packed_linear differs by {errors[0]:.1e} of the largest output, with 8-bit inputs by {errors[1]:.1e}"
    if errors[0] <= TOLERANCE and errors[1] <= EIGHT_BIT_TOLERANCE:
        return Check("product parity", detail)
    return Check("product parity", detail, "work", "set COMPRESS_ISA=portable, and report this machine's processor")


def _same_bits() -> Check:
    """Whether a token's product has the same bits alone, among others, and with any number of threads."""
    generator = torch.Generator().manual_seed(0)
    scheme = IntScheme(4, 64)
    codes = torch.randint(scheme.qmin, scheme.qmax + 1, (67, 256), dtype=torch.int8, generator=generator)
    scale = torch.rand(67, 4, generator=generator) + 0.01
    linear = packed_linear.pack_codes(pack_bits(codes, scheme.bits), scale, None, 256, scheme)
    x = torch.randn(40, 256, generator=generator)
    for eight_bit in (False, True):
        whole = packed_linear.multiply(linear, x, eight_bit, threads=2)
        parts = [
            packed_linear.multiply(linear, x[i : i + n], eight_bit, threads=1) for i, n in ((0, 1), (1, 4), (5, 35))
        ]
        if not torch.equal(whole, torch.cat(parts)):
            hint = "answers may depend on their neighbours: set COMPRESS_ISA=portable, and report this machine"
            return Check("deterministic", "a product depends on what else is computed", "work", hint)
    return Check("deterministic", "always, at no cost: every sum has one order, alone, batched, in chunks or threads")


def cpu_products() -> Iterator[Check]:
    """What multiplies each scheme's weights on the CPU, and a product of three tokens beside its definition."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(67, 256, generator=generator), torch.randn(3, 256, generator=generator)
    for name, scheme in SCHEMES.items():
        quantized = rtn.transform(weight, scheme, RtnConfig(scale_search=False), torch.bfloat16)
        static = scheme.inputs is not None and not scheme.inputs.dynamic
        scale = static_scale(4.0, scheme.inputs) if static and scheme.inputs is not None else 0.0
        rounded = x
        if scheme.inputs is not None:
            rounded = round_inputs(x, scheme.inputs, torch.tensor([scale]) if static else None)
        exact = rounded.double() @ quantized.dequantize().double().T
        linear = native_weights.repack(quantized, input_scale=scale)
        error = error_of_largest(packed_linear.multiply(linear, x), exact)
        detail = (
            f"{dispatch.choose('packed_linear', 'cpu').name}: {native_weights.weight_name(scheme, linear.bits)} x "
            f"{native_weights.input_name(scheme)}, differs from its definition by {error:.1e} of the largest output"
        )
        if error <= TOLERANCE:
            yield Check(f"scheme {name} on cpu", detail)
        else:
            hint = "set COMPRESS_ISA=portable, and report this machine's processor"
            yield Check(f"scheme {name} on cpu", detail, "work", hint)


def gpu_products() -> Iterator[Check]:
    """What multiplies each scheme's weights on the GPU, and one product there against its definition."""
    if (reason := available.obstacle("cuda")) is not None:
        yield Check("triton kernels", f"not used: {reason}")
        return
    yield Check("triton kernels", f"triton {metadata.version('triton')}; blocks from a table that no GPU was timed for")
    for name, scheme in SCHEMES.items():
        choice = gpu_linear.choose(scheme, 256, "cuda")
        yield Check(f"scheme {name} on cuda", f"{choice.name}: {choice.reason}")
    scheme = IntScheme(4, 64)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(scheme.qmin, scheme.qmax + 1, (67, 256), dtype=torch.int8, generator=generator)
    scale = (torch.rand(67, 4, generator=generator) + 0.01).bfloat16()
    packed, _ = gpu_linear.pack(QuantizedTensor(codes.cuda(), scale.cuda(), None, scheme), None, None)
    x = torch.randn(3, 256, generator=generator)
    exact = x.double() @ (codes.double().unflatten(1, (4, 64)) * scale.double().unsqueeze(-1)).flatten(1).T
    found = gpu_linear.multiply(packed, x.cuda())
    error = error_of_largest(found, exact)
    detail = f"a 4-bit product differs from its definition by {error:.1e} of the largest output"
    if error <= TOLERANCE:
        yield Check("triton parity", detail)
    else:
        yield Check("triton parity", detail, "work", "use --kernel reference, and report this GPU")
    alone, whole = (gpu_linear.multiply(packed, x[:tokens].cuda(), same=True) for tokens in (1, 3))
    if torch.equal(found, gpu_linear.multiply(packed, x.cuda())) and torch.equal(alone, whole[:1]):
        said = "the same steps repeat bit for bit; what is computed beside them changes nothing with --deterministic"
        yield Check("deterministic on cuda", said)
    else:
        said = "a product does not repeat, or depends on what else is computed"
        yield Check("deterministic on cuda", said, "work", "report this GPU")


def _content() -> Iterator[Check]:
    reinstall = "install the package again: it ships these files"
    try:
        corpora = json.loads((content.calibration_dir() / "MANIFEST.json").read_text(encoding="utf-8"))["corpora"]
    except (OSError, ValueError, KeyError) as error:
        yield Check("calibration texts", f"MANIFEST.json cannot be read: {error}", "integrity", reinstall)
        corpora = {}
    for name, corpus in corpora.items():
        path = content.calibration_dir() / corpus["file"]
        whole = path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == corpus["sha256"]
        said = f"{path.name}, sha256 as listed" if whole else f"{path.name} is missing or changed"
        yield Check(f"calibration text {name}", said, None if whole else "integrity", reinstall)
    try:
        model = Checkpoint.open(content.default_model())
        yield Check("packaged model", f"{model.path.name}, {len(model.index)} tensors, digest {model.digest()[:12]}")
        decision = decide(model, "cpu")
        yield Check("its back end", f"{decision.backend}: {decision.reason}")
    except CompressError as error:
        yield Check("packaged model", error.message, "integrity", reinstall)

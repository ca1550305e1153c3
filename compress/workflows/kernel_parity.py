"""The kernels against their definition on an artifact's own weights: one linear of every scheme, in a moment."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from compress.artifact.kernel_record import KernelRecord, ProductRecord
from compress.errors import WorkError
from compress.formats.inputs import round_inputs
from compress.formats.registry import Format
from compress.kernels import packed_linear
from compress.kernels.dispatch import native
from compress.kernels.parity import error_of_largest
from compress.models.checkpoint import Checkpoint
from compress.runtime.loading import decide
from compress.runtime.native_reader import dense_state
from compress.runtime.native_weights import Stored, input_scale
from compress.types import Scheme

TOKENS = 4


def kernel_record(path: str | Path) -> KernelRecord:
    """What a CPU multiplies an artifact's weights with, and how exactly. Reads one linear of each scheme.

    Raises:
        UserError, IntegrityError: as loading the artifact does.
        WorkError: a product that is not finite.
    """
    checkpoint = Checkpoint.open(path)
    decision = decide(checkpoint, "cpu")
    if decision.shape is not None:
        format, schemes = decision.shape.format, decision.shape.schemes
    elif decision.packed is not None:
        format, schemes = decision.packed.format, {name: slot.scheme for name, slot in decision.packed.slots.items()}
    else:
        return KernelRecord(backend=decision.backend, reason=decision.reason, isa=None, products=[])
    counts = Counter(schemes.values())
    first = {scheme: name for name, scheme in reversed(schemes.items())}
    products = [
        _product(checkpoint, format, first[scheme], scheme, count)
        for scheme, count in sorted(counts.items(), key=lambda each: each[0].label)
    ]
    return KernelRecord(backend=decision.backend, reason=decision.reason, isa=native().isa(), products=products)


def _product(checkpoint: Checkpoint, format: Format, linear: str, scheme: Scheme, linears: int) -> ProductRecord:
    weight: Tensor = dense_state(checkpoint)[f"{linear}.weight"][...]
    out, width = weight.shape
    packed = Stored(checkpoint, format, linear, (out, width), scheme).pack(slice(0, out), None)
    x = torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(0))
    exact = _rounded(x, checkpoint, format, linear, scheme).double() @ weight.double().T

    def error(eight_bit: bool) -> float:
        found = error_of_largest(packed_linear.multiply(packed, x, eight_bit), exact)
        if not math.isfinite(found):
            raise WorkError(
                f"the product of {linear} is not finite", "its weights hold NaN or overflow: make them again"
            )
        return found

    return ProductRecord(
        scheme=scheme.label,
        linear=linear,
        linears=linears,
        error=error(False),
        eight_bit_error=error(True) if scheme.inputs is None and packed.takes_eight_bit else None,
    )


def _rounded(x: Tensor, checkpoint: Checkpoint, format: Format, linear: str, scheme: Scheme) -> Tensor:
    if scheme.inputs is None:
        return x
    scale = input_scale(checkpoint, format, linear, scheme)
    return round_inputs(x, scheme.inputs, torch.tensor([scale]) if scale else None)

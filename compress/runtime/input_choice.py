"""Whether `--kernel auto` rounds the inputs of integer weights to 8 bits: where that is measured to cost little.

Products of integers are several times as fast as exact ones. What they cost is measured at load, on the beginning of
the shipped calibration text, because inputs decide it, and a model does not say what they are like. A few channels far
above the others cost little: the products take what is beyond 8 bits apart (`kernels.packed_linear`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from compress.runtime.loss import divergence, predictions

if TYPE_CHECKING:
    from compress.runtime.native_model import NativeModel

TOKENS = 32
MOST_LOST = 2e-3
"""KL in nats per token up to which `auto` rounds."""


def rounding_loss(model: NativeModel, sample: Callable[[], Sequence[int]]) -> float | None:
    """KL in nats per token to the model itself with exact products.

    None where it is not measured: no weight takes inputs in 8 bits, or no token of the sample is in the vocabulary.

    sample: tokens to measure on; asked for where something is measured.
    """
    if not any(part.takes_eight_bit for parts in model.linears.values() for part in parts):
        return None
    tokens = sample()[:TOKENS]
    if not tokens:
        return None
    before = model.eight_bit
    try:
        model.eight_bit = False
        exact = predictions(model, tokens)
        model.eight_bit = True
        return divergence(exact, predictions(model, tokens))
    finally:
        model.eight_bit = before

"""A quantised student: a packed artifact as a view of the dense model that it stands for, and the grids of its linears.

What learns are float weights behind the codes. The model computes with them rounded on the recorded grid, and gradients
go through that rounding as if it were none (straight-through, Bengio et al., arXiv:1308.3432; towards a teacher as in
quantisation-aware distillation, arXiv:2601.20088). Scales and zero points stay: before the first step the student is
the artifact, code for code, and at the end it has its scheme and its bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from compress.artifact.canonical import sha256_json
from compress.errors import UserError
from compress.formats import bitmask, registry
from compress.formats.compressed_tensors import is_for_own_reader
from compress.formats.registry import Format
from compress.models.checkpoint import Checkpoint
from compress.models.safetensors_header import TensorInfo
from compress.quantization.grid import Grid, quantize
from compress.types import IntScheme, QuantizedTensor, Scheme

if TYPE_CHECKING:
    from compress.progress import Progress

HINT = "distil the float model and quantise the result, for instance by a recipe of several stages"


@dataclass(frozen=True, eq=False, slots=True)
class Recorded:
    """The grid of one linear as its artifact has it, and how its codes are stored."""

    format: Format
    grid: Grid

    def dense(self, weight: Tensor) -> Tensor:
        """What the codes of weight (out, in) float32 stand for, float32."""
        return self.quantized(weight).dequantize().float()

    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """Nearest codes of weight (out, in) float32."""
        return quantize(weight, self.grid)

    def packed(self, weight: Tensor) -> dict[str, Tensor]:
        """What is stored of weight (out, in) float32, by local name."""
        return self.format.pack(self.quantized(weight), None)


class Packed(Checkpoint):
    """The artifact `source` with every packed linear as `<linear>.weight`, decoded as it is read.

    Hashes and sizes are the source's; a decoded weight's hash is over those of all that it is stored as.
    """

    def __init__(self, source: Checkpoint, format: Format, schemes: Mapping[str, IntScheme]) -> None:
        self.source, self._format, self._schemes = source, format, schemes
        self.parts = {
            linear: [part for part in format.parts if f"{linear}.{part}" in source.index] for linear in schemes
        }
        stored = {f"{linear}.{part}" for linear, parts in self.parts.items() for part in parts}
        index = {name: info for name, info in source.index.items() if name not in stored}
        for linear in schemes:
            found = self._quantized(linear)
            shape, dtype = tuple(found.codes.shape), found.scale.dtype
            name = f"{linear}.weight"
            index[name] = TensorInfo(name, dtype, shape, math.prod(shape) * dtype.itemsize, "", 0)
        config = {key: value for key, value in source.config.items() if key != "quantization_config"}
        super().__init__(source.path, config, dict(sorted(index.items())))

    @property
    def nbytes(self) -> int:
        return self.source.nbytes

    def read(self, name: str) -> Tensor:
        linear = name.removesuffix(".weight")
        return self._quantized(linear).dequantize() if linear in self._schemes else self.source.read(name)

    def sha256(self, name: str) -> str:
        linear = name.removesuffix(".weight")
        if linear not in self._schemes:
            return self.source.sha256(name)
        return sha256_json([[part, self.source.sha256(f"{linear}.{part}")] for part in self.parts[linear]])

    def digest(self, progress: Progress | None = None) -> str:
        return self.source.digest(progress)

    def recorded(self) -> dict[str, Recorded]:
        """The grid of every packed linear, by its name."""
        found = {}
        for linear, scheme in self._schemes.items():
            stored = self._quantized(linear)
            found[linear] = Recorded(self._format, Grid(stored.scale.clone(), stored.zero_point, scheme))
        return found

    def stored(self, linear: str) -> dict[str, Tensor]:
        """All that a packed linear is stored as, by full name."""
        return {name: self.source.read(name) for name in (f"{linear}.{part}" for part in self.parts[linear])}

    def _quantized(self, linear: str) -> QuantizedTensor:
        stored = {part: self.source.read(f"{linear}.{part}") for part in self.parts[linear]}
        return self._format.unpack(stored, self._schemes[linear])


def opened(checkpoint: Checkpoint) -> Checkpoint:
    """The model to train: the checkpoint itself, or the view of a packed one.

    Raises:
        UserError: codes that cannot be trained: no integers, inputs that are rounded too, or another layout.
        IntegrityError: a linear that the config does not describe.
    """
    quantization = checkpoint.config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("format") == bitmask.FORMAT:
        return checkpoint  # packed zeros are no codes: whoever reads its blocks names the dense copy to start from
    format: Format | None = None
    schemes: dict[str, Scheme] = {}
    if (known := registry.format_of(quantization)) is not None and known.name == "compressed-tensors":
        format, schemes = registry.schemes_of(quantization, checkpoint.index)
    reason = None
    if is_for_own_reader(quantization):
        reason = "it is stored for our own reader alone"
    elif format is None or not schemes:
        reason = f"its weights are stored as {quantization.get('quant_method') or quantization.get('format')}"
    elif other := next((s for s in schemes.values() if not isinstance(s, IntScheme) or s.inputs is not None), None):
        reason = f"only integer weights with float inputs can be trained, not {other.label}"
    elif quantization.get("kv_cache_scheme") is not None:
        reason = "scales of its key-value cache would no longer fit"
    if reason is not None or format is None:
        raise UserError(f"the student {checkpoint.path} is quantised in a way that cannot be trained: {reason}", HINT)
    return Packed(checkpoint, format, {name: s for name, s in schemes.items() if isinstance(s, IntScheme)})

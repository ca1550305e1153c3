"""Whether another format carries the quantised linears of a checkpoint as they are, and each of them in that format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from compress.errors import IntegrityError, UserError
from compress.exporters.dense import model_dtype
from compress.formats.compressed_tensors import is_for_own_reader
from compress.formats.names import FormatName, Refusal, refusal
from compress.formats.registry import FORMATS, Format
from compress.formats.tensors import exact, is_exact
from compress.models.checkpoint import Checkpoint
from compress.models.tables import in_block
from compress.progress import Progress
from compress.runtime.native_reader import packed_linears, stored_parts
from compress.types import Fp8Scheme, IntScheme, QuantizedTensor, Scheme

HEADS = ("lm_head", "embed_out")
"""Heads that may be tied, and then are in no file although a config leaves them out by name."""


@dataclass(frozen=True, eq=False, slots=True)
class Conversion:
    """Packed linears in two formats. schemes: in the target's; shapes: (out, in) of each; ignored: what stays dense."""

    checkpoint: Checkpoint
    source: Format
    target: Format
    source_schemes: dict[str, Scheme]
    schemes: dict[str, Scheme]
    shapes: dict[str, tuple[int, int]]
    ignored: list[str]
    scale_dtype: torch.dtype

    def source_names(self) -> dict[str, str]:
        """The linear of each tensor that the source stores for one."""
        names = {f"{linear}.{part}": linear for linear in self.schemes for part in self.source.parts}
        return {name: linear for name, linear in names.items() if name in self.checkpoint.index}

    def target_linear(self, name: str) -> str | None:
        """The linear that a tensor of the target belongs to."""
        for part in self.target.parts:
            if name.endswith(f".{part}") and (linear := name.removesuffix(f".{part}")) in self.schemes:
                return linear
        return None

    def pack(self, linear: str) -> dict[str, Tensor]:
        """The linear's tensors in the target, by local name, read back and found to be the same numbers.

        Raises:
            IntegrityError: they are not, which `plan` should have refused.
        """
        quantized, input_scale = _read(self.checkpoint, self.source, linear, self.source_schemes[linear])
        restated, scale = _restated(quantized, input_scale, self.schemes[linear], self.scale_dtype)
        stored = self.target.pack(restated, scale)
        if not _same(restated, self.target.unpack(stored, self.schemes[linear])):
            raise IntegrityError(f"{linear} would not come out as it was", "please report this with the recipe")
        return stored

    def stored_bits(self, linear: str) -> float:
        """Bits per weight that the target stores for a linear."""
        out, width = self.shapes[linear]
        return self.target.stored_bits(self.schemes[linear], out, width, self.scale_dtype) / (out * width)

    def config(self) -> dict[str, Any]:
        """The `quantization_config` of the target."""
        return self.target.config(self.schemes, self.ignored)


def plan(checkpoint: Checkpoint, to: str, progress: Progress) -> Conversion:
    """Looks at every linear, one at a time.

    Raises:
        UserError: the target does not carry what is stored here; the message names what and where.
        IntegrityError: the checkpoint is damaged.
    """
    quantization = checkpoint.config.get("quantization_config")
    if not isinstance(quantization, Mapping):
        raise UserError("nothing in this artifact is quantised", "`compress quantize --format NAME` packs it anew")
    if is_for_own_reader(quantization):
        raise UserError("its layout is for our own reader: no engine's format carries it", "use --to dense")
    source, before = packed_linears(checkpoint)
    if outside := [linear for linear in before if not in_block(linear)]:
        raise UserError(f"{to} has no place for {outside[0]}, which is in no block", "use --to dense")
    target = FORMATS[cast(FormatName, to)]
    if source is target:
        raise UserError(f"the artifact is in the format {to} already", "use it as it is")
    if quantization.get("kv_cache_scheme"):
        raise UserError(f"{to} has no place for its scales of keys and values", "quantise without --kv-scales")
    dtype = target.scale_dtype or model_dtype(checkpoint)
    progress.begin("looking at every weight", len(before))
    centred, shapes = True, {}
    for linear, scheme in before.items():
        quantized, input_scale = _read(checkpoint, source, linear, scheme)
        out, width = shapes[linear] = (quantized.codes.shape[0], quantized.codes.shape[1])
        found = refusal(target.name, scheme, source.name) or target.shape_refusal(scheme, out, width)
        found = found or _scale_refusal(quantized, input_scale, target, dtype) or target.value_refusal(quantized)
        if found is not None:
            raise UserError(f"{linear}: {found.reason}", _or_dense(found))
        centred &= quantized.zero_point is None or not bool(quantized.zero_point.any())
        progress.advance(linear)
    progress.end()
    after = {name: _symmetric(scheme) if centred else scheme for name, scheme in before.items()}
    ignored = source.ignored(quantization, [*_dense_linears(checkpoint, before), *HEADS])
    if (found := target.config_refusal(after, ignored) or _unloaded(target, after)) is not None:
        raise UserError(found.reason, _or_dense(found))
    return Conversion(checkpoint, source, target, before, after, shapes, ignored, dtype)


def _or_dense(found: Refusal) -> str:
    return f"{found.hint}, or --to dense" if found.hint else "use --to dense"


def _read(checkpoint: Checkpoint, format: Format, linear: str, scheme: Scheme) -> tuple[QuantizedTensor, Tensor | None]:
    stored = stored_parts(checkpoint, linear, format)
    try:
        quantized = format.unpack(stored, scheme)
    except (IntegrityError, UserError) as error:
        raise type(error)(f"{linear}: {error.message}", error.hint) from error
    static = scheme.inputs is not None and not scheme.inputs.dynamic
    return quantized, format.input_scale(stored, scheme) if static else None


def _restated(
    quantized: QuantizedTensor, input_scale: Tensor | None, scheme: Scheme, dtype: torch.dtype
) -> tuple[QuantizedTensor, Tensor | None]:
    """The same numbers under the target's scheme and in its dtype."""
    zero = quantized.zero_point if isinstance(scheme, IntScheme) and not scheme.symmetric else None
    restated = replace(quantized, zero_point=zero, scheme=scheme)
    if not isinstance(scheme, IntScheme | Fp8Scheme):
        return restated, input_scale
    scale = None if input_scale is None else exact(input_scale, dtype)
    return replace(restated, scale=exact(quantized.scale, dtype)), scale


def _scale_refusal(
    quantized: QuantizedTensor, input_scale: Tensor | None, target: Format, dtype: torch.dtype
) -> Refusal | None:
    if not isinstance(quantized.scheme, IntScheme | Fp8Scheme):
        return None
    for what, scale in (("a scale", quantized.scale), ("the scale of inputs", input_scale)):
        if scale is not None and not is_exact(scale, dtype):
            said = f"{target.name} stores scales in {_spelled(dtype)}, and {what} in {_spelled(scale.dtype)} is no such"
            return Refusal(
                f"{said} number", f"quantise with --format {target.name}, which chooses codes for its scales"
            )
    return None


def _unloaded(target: Format, schemes: Mapping[str, Scheme]) -> Refusal | None:
    """Why loaders of the target would not find what is there, although the files can be written."""
    experts = {scheme for name, scheme in schemes.items() if ".experts." in name}
    if experts and not target.experts:
        return Refusal(f"{target.name} has no place for experts, which models keep fused", "leave it as it is")
    if target.name != "compressed-tensors":
        return None
    asymmetric = not all(scheme.symmetric for scheme in schemes.values())
    if len(experts) > 1 or (experts and asymmetric) or (asymmetric and len(set(schemes.values())) > 1):
        return Refusal(
            "compressed-tensors carries zero points of one scheme only, and none of experts", "leave it as is"
        )
    return None


def _same(left: QuantizedTensor, right: QuantizedTensor) -> bool:
    """Whether both are the same numbers; zero points in the middle are none."""
    pairs = [(left.scale, right.scale), (left.zero_point, right.zero_point), (left.divisor, right.divisor)]
    codes = torch.equal(left.codes.view(torch.uint8), right.codes.view(torch.uint8))
    return codes and all(torch.equal(*_numbers(one, other)) for one, other in pairs)


def _numbers(left: Tensor | None, right: Tensor | None) -> tuple[Tensor, Tensor]:
    some = left if left is not None else right
    none = torch.zeros(()) if some is None else torch.zeros(some.shape)
    return (none if left is None else left).double(), (none if right is None else right).double()


def _symmetric(scheme: Scheme) -> Scheme:
    return replace(scheme, symmetric=True) if isinstance(scheme, IntScheme) else scheme


def _dense_linears(checkpoint: Checkpoint, quantized: Mapping[str, Scheme]) -> list[str]:
    names = (name.removesuffix(".weight") for name, info in checkpoint.index.items() if len(info.shape) == 2)
    return [name for name in names if name not in quantized and f"{name}.weight" in checkpoint.index]


def _spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

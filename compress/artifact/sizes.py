"""Bytes, bits per weight and ratios of an artifact, from its ledger and tensor records alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from compress.artifact.ledger import LedgerEntry
from compress.artifact.manifest import Parent, SizesRecord, TensorRecord
from compress.formats.safetensors_header import ELEMENT_BYTES

_BESIDE = (".weight_shape", ".k_scale", ".v_scale", ".quant_state.bitsandbytes__nf4")
"""What is stored for a linear and is not its weight, by the end of its name."""


def tensor_nbytes(record: TensorRecord) -> int:
    """Bytes of one stored tensor."""
    return math.prod(record.shape) * ELEMENT_BYTES[record.dtype]


def sizes(
    *,
    source_shapes: Mapping[str, Sequence[int]],
    ledger: Mapping[str, LedgerEntry],
    tensors: Mapping[str, TensorRecord],
    file_bytes: int,
    parents: Sequence[Parent],
) -> SizesRecord:
    """The sizes of an artifact whose weight files are `file_bytes` long.

    Weights are counted from the source's shapes, or the output's where rows or columns were cut; a tied copy is not
    counted again, and a dropped tensor is not a weight of the output. The few bytes that spell a packed tensor's shape,
    or that scale the cache, are in the file's bits, not the linears'.
    """
    parameters = sum(
        math.prod(_shape(source_shapes[name], entry, tensors))
        for name, entry in ledger.items()
        if entry.action not in ("tied", "dropped")
    )
    quantized = {name: entry for name, entry in ledger.items() if entry.action == "quantized"}
    quantized_parameters = sum(math.prod(source_shapes[name]) for name in quantized)
    stored = {name for entry in quantized.values() for name in entry.into if not name.endswith(_BESIDE)}
    quantized_bits = 8 * sum(tensor_nbytes(tensors[name]) for name in stored)
    all_bits = 8 * sum(tensor_nbytes(record) for record in tensors.values())
    return SizesRecord(
        bytes=file_bytes,
        parameters=parameters,
        quantized_parameters=quantized_parameters,
        bits_per_weight=_ratio(quantized_bits, quantized_parameters) if quantized_parameters else None,
        file_bits_per_weight=_ratio(all_bits, parameters),
        ratio_to_parent=_ratio(file_bytes, parents[-1].bytes),
        ratio_to_root=_ratio(file_bytes, parents[0].bytes),
    )


def _shape(source: Sequence[int], entry: LedgerEntry, tensors: Mapping[str, TensorRecord]) -> Sequence[int]:
    """The shape whose weights count: the output's where rows or columns were cut, else the source's."""
    cut = entry.action in ("pruned", "repaired") and len(entry.into) == 1  # several: packed, and as large as before
    return tensors[entry.into[0]].shape if cut else source


def _ratio(part: int, whole: int) -> float:
    return round(part / whole, 6) if whole else 0.0

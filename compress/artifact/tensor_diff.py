"""Which tensors differ between two sets of weight files, and by how much."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from compress.artifact.tensorfile import StoredTensor, natural_key

Kind = Literal["added", "removed", "reshaped", "changed", "repacked"]

_PACKED = ".weight_packed"
_PACKED_PARTS = (_PACKED, ".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx")
_ROWS = 64


@dataclass(frozen=True, slots=True)
class TensorChange:
    """One tensor that differs.

    `reshaped`: other shape or dtype. `repacked`: a plain weight on one side, packed codes on the other (`name` is the
    linear's). `changed`: same layout, other bytes; then `codes_differing` is the share of differing codes of a packed
    weight, `relative_change` is ||a - b|| / ||a|| of a floating-point tensor, and None says that it does not apply.
    """

    name: str
    kind: Kind
    a: str | None
    b: str | None
    codes_differing: float | None = None
    relative_change: float | None = None


def tensor_changes(
    a: Mapping[str, StoredTensor],
    b: Mapping[str, StoredTensor],
    hashes_a: Mapping[str, str],
    hashes_b: Mapping[str, str],
) -> list[TensorChange]:
    """The differences, in natural name order. Hashes that are not given are computed from the files."""
    found = []
    repacked = _repacked(a, b) | _repacked(b, a)
    for linear in repacked:
        found.append(TensorChange(linear, "repacked", _linear_layout(linear, a), _linear_layout(linear, b)))
    for name in {*a, *b}:
        left, right = a.get(name), b.get(name)
        if _linear_of(name) in repacked:
            continue
        if left is None or right is None:
            found.append(TensorChange(name, "added" if left is None else "removed", _layout(left), _layout(right)))
        elif (left.dtype, left.shape) != (right.dtype, right.shape):
            found.append(TensorChange(name, "reshaped", _layout(left), _layout(right)))
        elif (hashes_a.get(name) or _sha256(left)) != (hashes_b.get(name) or _sha256(right)):
            found.append(_changed(name, left, right, a))
    return sorted(found, key=lambda change: natural_key(change.name))


def _repacked(plain: Mapping[str, StoredTensor], packed: Mapping[str, StoredTensor]) -> set[str]:
    linears = {name.removesuffix(_PACKED) for name in packed if name.endswith(_PACKED)}
    return {linear for linear in linears if linear + ".weight" in plain and linear + _PACKED not in plain}


def _linear_of(name: str) -> str | None:
    for suffix in (".weight", *_PACKED_PARTS):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return None


def _layout(tensor: StoredTensor | None) -> str | None:
    return None if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _linear_layout(linear: str, tensors: Mapping[str, StoredTensor]) -> str:
    parts = [suffix for suffix in (".weight", *_PACKED_PARTS) if linear + suffix in tensors]
    return ", ".join(f"{suffix[1:]} {_layout(tensors[linear + suffix])}" for suffix in parts)


def _sha256(tensor: StoredTensor) -> str:
    digest = hashlib.sha256()
    for chunk in tensor.chunks():
        digest.update(chunk)
    return digest.hexdigest()


def _changed(name: str, left: StoredTensor, right: StoredTensor, tensors: Mapping[str, StoredTensor]) -> TensorChange:
    layout = _layout(left)
    if name.endswith(_PACKED) and left.dtype == "I32" and len(left.shape) == 2:
        shape = tensors.get(name.removesuffix(_PACKED) + ".weight_shape")
        share = _codes_differing(left, right, shape) if shape is not None else None
        return TensorChange(name, "changed", layout, layout, codes_differing=share)
    if left.dtype in ("F64", "F32", "F16", "BF16"):
        return TensorChange(name, "changed", layout, layout, relative_change=_relative_change(left, right))
    return TensorChange(name, "changed", layout, layout)


def _codes_differing(left: StoredTensor, right: StoredTensor, shape: StoredTensor) -> float | None:
    """Share of codes that differ between two packed weights; None if their number of bits is not clear."""
    _, width = _map(shape).view("<i8").tolist()
    rows, words = left.shape
    fitting = [bits for bits in range(2, 9) if -(-width * bits // 32) == words]
    if len(fitting) != 1:
        return None
    bits = fitting[0]
    a, b = (_map(tensor).view("<u4").reshape(rows, words) for tensor in (left, right))
    differing = 0
    for start in range(0, rows, _ROWS):
        # A code differs where any of its bits does: XOR, spell the bits out, and look at each code's run of them.
        unequal = np.bitwise_xor(a[start : start + _ROWS], b[start : start + _ROWS]).view(np.uint8)
        stream = np.unpackbits(unequal, axis=1, bitorder="little")[:, : width * bits]
        differing += int(stream.reshape(-1, width, bits).any(axis=2).sum())
    return differing / (rows * width)


def _relative_change(left: StoredTensor, right: StoredTensor) -> float | None:
    a, b = _map(left), _map(right)
    width = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}[left.dtype]
    step = (1 << 20) * width
    apart = norm = 0.0
    for start in range(0, len(a), step):
        x, y = (_floats(part[start : start + step], left.dtype) for part in (a, b))
        apart += float(np.square(x - y).sum())
        norm += float(np.square(x).sum())
    return (apart / norm) ** 0.5 if norm else None


def _floats(data: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (data.view("<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    return data.view({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float64)


def _map(tensor: StoredTensor) -> np.ndarray:
    """The tensor's bytes, mapped from its file."""
    if tensor.nbytes == 0:
        return np.empty(0, np.uint8)
    return np.memmap(tensor.file, dtype=np.uint8, mode="r", offset=tensor.start, shape=(tensor.nbytes,))

"""What the bytes of an artifact are: codes, scales, embeddings, and the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from compress.artifact.sizes import tensor_nbytes
from compress.evaluation.reports.document import Section, Table
from compress.evaluation.reports.values import size, value

if TYPE_CHECKING:
    from compress.artifact.manifest import Manifest

_PARTS = {
    "weight_packed": "codes of quantised linears",
    "weight": "codes of quantised linears",
    "weight_scale": "scales",
    "weight_global_scale": "scales",
    "input_scale": "scales",
    "weight_zero_point": "zero points",
}
OTHER = "shapes and other small parts of quantised linears"
HEADERS = "file headers"


def size_section(manifest: Manifest) -> Section:
    """One row per part, the largest first; the rows add up to the weight files."""
    counted = breakdown(manifest)
    rows = []
    shades: list[tuple[float | None, ...]] = []
    order = sorted(counted, key=lambda part: (-counted[part][1], part))
    for part in order:
        tensors, stored = counted[part]
        share = stored / manifest.sizes.bytes
        rows.append((part, str(tensors) if tensors else "", size(stored), value(share, "share")))
        shades.append((None, None, None, share))
    total = (f"weight files of {manifest.sizes.parameters:,} weights", str(len(manifest.tensors)))
    rows.append((*total, size(manifest.sizes.bytes), "100%"))
    shades.append((None, None, None, 0.0))
    table = Table(("part", ">tensors", ">size", ">share"), tuple(rows), tuple(shades), bars=True)
    return Section("What the bytes are", table=table)


def breakdown(manifest: Manifest) -> dict[str, tuple[int, int]]:
    """Part -> (how many tensors, their bytes); together the weight files."""
    roles = _roles(manifest)
    found: dict[str, tuple[int, int]] = {}
    for name, record in manifest.tensors.items():
        part = roles.get(name) or _dense_part(name, len(record.shape))
        tensors, stored = found.get(part, (0, 0))
        found[part] = (tensors + 1, stored + tensor_nbytes(record))
    rest = manifest.sizes.bytes - sum(stored for _, stored in found.values())
    return {**found, HEADERS: (0, rest)}


def _roles(manifest: Manifest) -> Mapping[str, str]:
    """What the tensors of quantised linears are, by name."""
    quantized = [entry for entry in manifest.ledger.values() if entry.action == "quantized"]
    return {name: _PARTS.get(name.rpartition(".")[2], OTHER) for entry in quantized for name in entry.into}


def _dense_part(name: str, dimensions: int) -> str:
    if dimensions < 2:
        return "norms and biases"
    if "embed" in name or name.endswith(("wte.weight", "wpe.weight")):
        return "embeddings"
    return "output head" if "lm_head" in name or "embed_out" in name else "other matrices"

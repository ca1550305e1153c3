"""Layer by layer: what the files store, what memory holds, what a token reads, and whether packed weights were decoded.

A packed weight that is read at its dense size is a dense fallback: the artifact is smaller on disk and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compress.errors import UserError
from compress.evaluation.costs.record import LayerCost
from compress.evaluation.costs.sizes import Stored, classify, stored_modules
from compress.models.checkpoint import Checkpoint
from compress.models.families import family_of
from compress.runtime.protocol import LayerUse

TOLERANCE = 1.1
"""Bytes in use over bytes stored from which a packed layer counts as decoded; kernels pad rows and widen scales."""

MEMORY_SLACK = 32_000_000
"""Bytes of a loaded model that are not weights: tokenizer, configuration, allocator."""


def layer_costs(checkpoint: Checkpoint, uses: Sequence[LayerUse]) -> list[LayerCost]:
    """Each linear that the runtime computes, with what the checkpoint stores of it."""
    stored = stored_modules(checkpoint)
    renames = _renames(checkpoint)
    return [_layer(use, _find(use, stored, renames)) for use in uses]


def expected_bytes(checkpoint: Checkpoint, itemsize: int) -> tuple[int, int]:
    """(bytes to hold with packed weights kept packed, bytes with all decoded), others at `itemsize` bytes a weight."""
    modules = stored_modules(checkpoint).values()
    packed = [module for module in modules if module.packed]
    others = itemsize * sum(module.weights for module in modules if not module.packed)
    kept = sum(module.bytes + module.scale_bytes for module in packed)
    return others + kept, others + itemsize * sum(module.weights for module in packed)


def fallback_reason(
    layers: Sequence[LayerCost], held_bytes: int | None, packed_bytes: int, decoded_bytes: int
) -> str | None:
    """Why this run used decoded weights; None if it did not.

    The layers' own account decides first. The memory held (None: not measured) is then compared with the two values of
    `expected_bytes`, so that a runtime which says that it reads packed weights and yet keeps dense ones is found out;
    where those two are close together, memory cannot tell.
    """
    fallen = [layer for layer in layers if layer.dense_fallback]
    if fallen:
        used = sum(max(layer.held_bytes, layer.read_bytes) for layer in fallen)
        stored = sum(layer.stored_bytes or 0 for layer in fallen)
        return (
            f"{len(fallen)} packed layers are computed from decoded weights (kernel {fallen[0].kernel}): "
            f"{used} bytes in use for {stored} stored"
        )
    if held_bytes is None or decoded_bytes - packed_bytes < 2 * MEMORY_SLACK:
        return None
    if held_bytes > (packed_bytes + decoded_bytes) / 2 + MEMORY_SLACK:
        return f"the loaded model holds {held_bytes} bytes, which is what decoded weights take, not the stored format"
    return None


def _layer(use: LayerUse, found: Sequence[tuple[str, Stored]]) -> LayerCost:
    packed = any(module.packed for _, module in found)
    size = sum(module.bytes + module.scale_bytes for _, module in found)
    return LayerCost(
        name=use.name,
        tensor_class=classify(use.name) if not found or _is_head(use.name) else found[0][1].tensor_class,
        kernel=use.kernel,
        weights=use.weights,
        packed=packed,
        stored_bytes=size or None,
        held_bytes=use.held_bytes,
        read_bytes=use.read_bytes,
        dense_fallback=packed and max(use.held_bytes, use.read_bytes) > TOLERANCE * size,
    )


def _is_head(name: str) -> bool:
    """A tied head is stored as the embedding, and yet it is the head that multiplies."""
    return classify(name) == "head"


def _find(use: LayerUse, stored: Mapping[str, Stored], renames: Sequence[tuple[str, str]]) -> list[tuple[str, Stored]]:
    """The stored modules behind one used: its own name, a rename, its name without the base prefix, or an alias.

    Fused experts are stored one by one below the name of their module.
    """
    for name in (use.name, *use.aliases):
        renamed = [name.replace(ours, theirs) for ours, theirs in renames]
        for spelling in (name, *renamed, name.partition(".")[2]):
            if spelling in stored:
                return [(spelling, stored[spelling])]
            below = [(n, module) for n, module in stored.items() if spelling and n.startswith(f"{spelling}.")]
            if below:
                return below
    return []


def _renames(checkpoint: Checkpoint) -> Sequence[tuple[str, str]]:
    try:
        return family_of(checkpoint.config.get("model_type")).renames
    except UserError:
        return ()

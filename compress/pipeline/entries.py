"""What the journal of a run holds: one entry for each part that was finished, under its key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from compress.artifact.layers import LayerRecord
from compress.artifact.manifest import Fallback
from compress.artifact.staging import Staging
from compress.pipeline import output
from compress.pipeline.inputs import Activations
from compress.pipeline.kinds import Fate
from compress.pipeline.work import Work

OUTER, DECISION, EMBEDDING, HEAD, REFINE = "outer", "decision", "embedding", "head", "refine"
"""The keys of entries that are of no block."""


def blocks_done(staging: Staging) -> int:
    """How many blocks the journal holds."""
    return sum(entry["key"] not in (OUTER, DECISION, EMBEDDING, HEAD, REFINE) for entry in staging.journal())


def holds(staging: Staging, key: str) -> bool:
    """Whether the journal holds an entry of this key."""
    return any(entry["key"] == key for entry in staging.journal())


def commit(
    job: Work,
    staging: Staging,
    key: str,
    tensors: Mapping[str, Tensor],
    fate: Fate,
    layers: Sequence[LayerRecord] = (),
    fallbacks: Sequence[Fallback] = (),
    state: Activations | None = None,
    earlier: Mapping[str, str] | None = None,
    attachments: Mapping[str, str] | None = None,
) -> None:
    """Stores one entry; `earlier` holds the hashes of tensors of parts before it, `attachments` files by name."""
    part = staging.write_part(key, tensors)
    written = {**(earlier or {}), **{name: record["sha256"] for name, record in part["tensors"].items()}}
    staging.commit(
        {
            "key": key,
            "part": part,
            "state": None if state is None else staging.write_state(key, state.state()),
            "ledger": {name: entry.model_dump() for name, entry in output.ledger(job, fate, written).items()},
            "layers": [layer.model_dump(mode="json") for layer in layers],
            "fallbacks": [fallback.model_dump() for fallback in fallbacks],
            "replaces": earlier is not None,
            "attachments": dict(attachments or {}),
        }
    )

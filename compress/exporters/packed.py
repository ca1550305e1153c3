"""An artifact's codes packed as another format has them: the same numbers, nothing rounded again.

Codes, zero points and scales go over number for number, or the export is refused before anything is written. The new
directory is an artifact as well: it is staged, resumed and published as one, its lineage is one step longer, and its
ledger leads from the same source tensors to the new names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import compress
from compress.artifact.canonical import sha256_file, sha256_json
from compress.artifact.layers import LayerRecord
from compress.artifact.ledger import LedgerEntry
from compress.artifact.manifest import CARD_NAME, EVAL_NAME, LAYERS_NAME, SAMPLES_NAME, Parent
from compress.artifact.output import Identity, refuse_itself
from compress.artifact.publish import Contents
from compress.artifact.reader import Artifact
from compress.artifact.staging import Staging
from compress.artifact.verify import require_sound
from compress.errors import IntegrityError
from compress.exporters import lossless
from compress.exporters.lossless import Conversion
from compress.models.checkpoint import Checkpoint
from compress.progress import NullProgress, Progress

_REWRITTEN = {CARD_NAME, LAYERS_NAME, EVAL_NAME, SAMPLES_NAME}
_OUTER = "outer"


@dataclass(frozen=True, slots=True)
class PackedExport:
    """The new artifact, whether it was there already, and where what was there before and no artifact is kept."""

    artifact: Artifact
    complete_already: bool
    kept_aside: Path | None = None


def export_packed(
    artifact: str | Path, output: str | Path, to: str, *, restart: bool = False, progress: Progress | None = None
) -> PackedExport:
    """Writes the artifact in the format `to` at `output`, which appears complete or not at all.

    restart: start over, and replace what is at `output` once the new artifact is whole.

    Raises:
        UserError: no artifact there, `output` holds something, or the format does not carry these weights as they are.
        IntegrityError: the artifact is damaged.
        WorkError: it cannot be written.
    """
    source = Artifact.open(artifact)
    refuse_itself(source.path, output)
    require_sound(source.path)
    checkpoint, shown = Checkpoint.open(source.path), progress or NullProgress()
    with Staging(output, _identity(source, checkpoint, to), restart=restart) as staging:
        if (there := staging.completed()) is not None:
            return PackedExport(there, True)
        conversion = lossless.plan(checkpoint, to, shown)
        done = {entry["key"] for entry in staging.journal()}
        parts = {key: names for key, names in _parts(source, conversion).items() if key not in done}
        shown.begin(f"packing as {to}", len(parts))
        for key, names in parts.items():
            tensors = _outer(checkpoint, conversion) if key == _OUTER else _packed(conversion, names)
            staging.commit({"key": key, "part": staging.write_part(key, tensors), "state": None})
            shown.advance(key)
        shown.end()
        made = staging.publish(_contents(source, checkpoint, conversion, staging))
        return PackedExport(made, False, staging.kept_aside)


def _recipe_hash(source: Artifact, to: str) -> str:
    return sha256_json({"recipe": source.manifest.recipe_hash, "export": to})


def _identity(source: Artifact, checkpoint: Checkpoint, to: str) -> Identity:
    calibration = source.manifest.calibration
    return Identity(
        recipe_hash=_recipe_hash(source, to),
        source=source.artifact_id,
        calibration=None if calibration is None else calibration.sha256,
        environment={"compress": compress.__version__},
        files={file.name: sha256_file(file) for file in checkpoint.aux_files()},
    )


def _parts(source: Artifact, conversion: Conversion) -> dict[str, list[str]]:
    """The linears of each decoder block by the key of their part; what is not quantised has a part of its own."""
    blocks = {layer["name"]: int(layer["block"]) for layer in source.layers()}
    found: dict[str, list[str]] = defaultdict(list)
    for name in conversion.schemes:
        found[f"block-{blocks.get(name, 0):05d}"].append(name)
    return {_OUTER: [], **dict(sorted(found.items()))}


def _outer(checkpoint: Checkpoint, conversion: Conversion) -> dict[str, Tensor]:
    stored = conversion.source_names()
    return {name: checkpoint.read(name) for name in checkpoint.index if name not in stored}


def _packed(conversion: Conversion, names: Sequence[str]) -> dict[str, Tensor]:
    return {f"{name}.{part}": tensor for name in names for part, tensor in conversion.pack(name).items()}


def _contents(source: Artifact, checkpoint: Checkpoint, conversion: Conversion, staging: Staging) -> Contents:
    manifest = source.manifest
    written = {name: record for entry in staging.journal() for name, record in entry["part"]["tensors"].items()}
    attached = [name for name in manifest.attachments if name not in _REWRITTEN]
    parent = Parent(
        kind="artifact",
        name=source.path.name,
        digest=source.artifact_id,
        stage=f"export to {conversion.target.name}",
        bytes=manifest.sizes.bytes,
    )
    ledger, shapes = _ledger(source, checkpoint, conversion, written)
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    return Contents(
        config={**config, "quantization_config": conversion.config()},
        aux_files=checkpoint.aux_files(),
        recipe=manifest.recipe,
        recipe_hash=_recipe_hash(source, conversion.target.name),
        recipe_yaml=source.recipe_text,
        parents=[*manifest.parents, parent],
        source_shapes=shapes,
        ledger=ledger,
        layers=[_layer(row, conversion) for row in source.layers()],
        created_with=f"compress {compress.__version__}",
        fallbacks=manifest.fallbacks,
        calibration=manifest.calibration,
        environment=manifest.environment,
        attachments={name: data for name in attached if (data := source.attachment(name)) is not None},
    )


def _layer(row: Mapping[str, Any], conversion: Conversion) -> LayerRecord:
    """The report of a linear, its errors as they were: only what is stored is new."""
    scheme = conversion.schemes.get(row["name"])
    if scheme is None:
        return LayerRecord(**row)
    stored = conversion.stored_bits(row["name"])
    return LayerRecord(**{**row, "scheme": scheme.label, "bits_per_weight": stored})


def _ledger(
    source: Artifact, checkpoint: Checkpoint, conversion: Conversion, written: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, LedgerEntry], dict[str, Sequence[int]]]:
    """The entries with the new names, and a shape of as many weights for each source tensor."""
    linears = conversion.source_names()
    packed: dict[str, list[str]] = defaultdict(list)
    for name in written:
        if (linear := conversion.target_linear(name)) is not None:
            packed[linear].append(name)
    ledger: dict[str, LedgerEntry] = {}
    shapes: dict[str, Sequence[int]] = {}
    for name, entry in source.manifest.ledger.items():
        hit = dict.fromkeys(linears[output] for output in entry.into if output in linears)
        into = [output for output in entry.into if output not in linears]
        into += [new for linear in hit for new in packed[linear]]
        if missing := [new for new in into if new not in written]:
            raise IntegrityError(f"{missing[0]} was not written", "please report this with the recipe")
        ledger[name] = LedgerEntry.of(entry.action, entry.source_sha256, {new: written[new]["sha256"] for new in into})
        if hit:
            shapes[name] = [sum(out * width for out, width in (conversion.shapes[linear] for linear in hit))]
        else:
            shapes[name] = checkpoint.index[entry.into[0]].shape if entry.into else []
    return ledger, shapes

"""Build the whole artifact directory: weights, config, source files, recipe, report, card, and last the manifest."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.artifact import durable
from compress.artifact.assemble import Part, assemble
from compress.artifact.canonical import read_chunks
from compress.artifact.card import render
from compress.artifact.cut import CUT_NAME
from compress.artifact.drafting import DRAFT_NAME
from compress.artifact.kernel_record import KERNELS_NAME
from compress.artifact.layers import LayerRecord, layers_json
from compress.artifact.ledger import LedgerEntry, check_ledger
from compress.artifact.manifest import (
    CARD_NAME,
    CONFIG_NAME,
    EVAL_NAME,
    INDEX_NAME,
    LAYERS_NAME,
    MANIFEST_NAME,
    RECIPE_NAME,
    SAMPLES_NAME,
    CalibrationRecord,
    Fallback,
    FileRecord,
    Manifest,
    Parent,
)
from compress.artifact.sizes import sizes
from compress.artifact.token_sketch import SKETCH_NAME, TokenSketch
from compress.artifact.training import TRAINING_NAME
from compress.errors import IntegrityError
from compress.formats.names import CONFIG_FILES

DEFAULT_SHARD_BYTES = 5_000_000_000
_RESERVED = {
    *(CONFIG_NAME, RECIPE_NAME, LAYERS_NAME, CARD_NAME, MANIFEST_NAME, INDEX_NAME),
    *(CUT_NAME, DRAFT_NAME, EVAL_NAME, KERNELS_NAME, SAMPLES_NAME, SKETCH_NAME, TRAINING_NAME),
    *CONFIG_FILES,
}


@dataclass(frozen=True)
class Contents:
    """All of an artifact but its weights, which come from the committed parts.

    `config`: what config.json is to hold. `aux_files`: files copied as they are (tokenizer, generation config ...).
    `recipe`: the resolved recipe as plain data, with its `recipe_hash` and its runnable text `recipe_yaml`.
    `attachments`: further files that tell how it was made, by name.
    `parents`: root first, the immediate source last. `source_shapes`: shape of every source tensor, by name.
    """

    config: Mapping[str, Any]
    aux_files: Sequence[Path]
    recipe: Mapping[str, Any]
    recipe_hash: str
    recipe_yaml: str
    parents: Sequence[Parent]
    source_shapes: Mapping[str, Sequence[int]]
    ledger: Mapping[str, LedgerEntry]
    layers: Sequence[LayerRecord]
    created_with: str
    fallbacks: Sequence[Fallback] = ()
    calibration: CalibrationRecord | None = None
    calibration_sketch: TokenSketch | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    attachments: Mapping[str, bytes] = field(default_factory=dict)


def build(
    directory: Path,
    parts: Sequence[Part],
    contents: Contents,
    *,
    identity_sha256: str,
    version: int,
    max_shard_bytes: int,
    replaced: Mapping[Path, Collection[str]] | None = None,
) -> Manifest:
    """Write a complete artifact into `directory`, which is made anew, and fsync every file and the directory.

    replaced: tensors of a part that a later part holds anew.

    Raises IntegrityError if the ledger does not add up, WorkError if something cannot be written.
    """
    _check_names(contents.aux_files)
    durable.remove_tree(directory)
    durable.make_directory(directory)
    tensors, files = assemble(directory, parts, max_shard_bytes, replaced or {})
    check_ledger(contents.ledger, contents.source_shapes, {name: t.sha256 for name, t in tensors.items()})
    weight_bytes = sum(record.bytes for name, record in files.items() if name.endswith(".safetensors"))
    config = json.dumps(contents.config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    files[CONFIG_NAME] = _write(directory / CONFIG_NAME, config.encode())
    for name, data in _config_files(contents.config).items():
        files[name] = _write(directory / name, data)
    files[RECIPE_NAME] = _write(directory / RECIPE_NAME, contents.recipe_yaml.encode())
    for source in contents.aux_files:
        sha256, size = durable.write_stream(directory / source.name, read_chunks(source))
        files[source.name] = FileRecord(sha256=sha256, bytes=size)
    manifest = Manifest.seal(
        version=version,
        created=_now(),
        created_with=contents.created_with,
        parents=list(contents.parents),
        recipe=dict(contents.recipe),
        recipe_hash=contents.recipe_hash,
        identity_sha256=identity_sha256,
        calibration=contents.calibration,
        sizes=sizes(
            source_shapes=contents.source_shapes,
            ledger=contents.ledger,
            tensors=tensors,
            file_bytes=weight_bytes,
            parents=contents.parents,
        ),
        fallbacks=list(contents.fallbacks),
        environment=dict(sorted(contents.environment.items())),
        attachments={},
        files=dict(sorted(files.items())),
        ledger=dict(sorted(contents.ledger.items())),
        tensors=tensors,
    )
    report = layers_json(contents.layers)
    learned, cut = (
        json.loads(found) if (found := contents.attachments.get(name)) else None for name in (TRAINING_NAME, CUT_NAME)
    )
    card = render(manifest, contents.config, json.loads(report), None, learned, cut).encode()
    attached = {**contents.attachments, LAYERS_NAME: report, CARD_NAME: card}
    if contents.calibration_sketch is not None:
        attached[SKETCH_NAME] = contents.calibration_sketch.to_bytes()
    manifest = manifest.with_attachments(
        {name: durable.write_bytes(directory / name, data) for name, data in attached.items()}
    )
    durable.write_bytes(directory / MANIFEST_NAME, manifest.to_bytes())
    durable.fsync_dir(directory)
    return manifest


def _write(path: Path, data: bytes) -> FileRecord:
    return FileRecord(sha256=durable.write_bytes(path, data), bytes=len(data))


def _config_files(config: Mapping[str, Any]) -> dict[str, bytes]:
    """What the weights' format keeps beside config.json."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return {}
    from compress.formats.registry import format_of  # it brings torch

    found = format_of(quantization)
    return {} if found is None else {name: make(quantization) for name, make in found.files.items()}


def _check_names(aux_files: Sequence[Path]) -> None:
    names = [file.name for file in aux_files]
    for name in names:
        if name in _RESERVED or name.endswith(".safetensors") or names.count(name) > 1:
            raise IntegrityError(f"a source file called {name} cannot be copied into an artifact", "rename it")


def _now() -> str:
    """The time as ISO 8601 in UTC; SOURCE_DATE_EPOCH overrides it, as reproducible builds have it."""
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))

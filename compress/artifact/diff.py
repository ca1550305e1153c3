"""What differs between two artifacts, or an artifact and a plain Hugging Face model directory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.artifact.canonical import sha256_file
from compress.artifact.manifest import CONFIG_NAME, Manifest
from compress.artifact.reader import Artifact, follow_latest, is_artifact
from compress.artifact.scores import headline_scores
from compress.artifact.tensor_diff import TensorChange, tensor_changes
from compress.artifact.tensorfile import StoredTensor, natural_key, read_header
from compress.artifact.verify import require_sound
from compress.errors import UserError


@dataclass(frozen=True, slots=True)
class Change:
    """A value that differs: its dotted path, and what it is on either side (None: not there)."""

    where: str
    a: Any
    b: Any


@dataclass(slots=True)
class Diff:
    """Everything that differs between `a` and `b`; `same` when nothing does but times and places."""

    a: Path
    b: Path
    recipe: list[Change] = field(default_factory=list)
    made_with: list[Change] = field(default_factory=list)  # lineage, calibration, environment, fallbacks
    config: list[Change] = field(default_factory=list)
    files: list[Change] = field(default_factory=list)
    tensors: list[TensorChange] = field(default_factory=list)
    sizes: list[Change] = field(default_factory=list)
    scores: list[Change] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether both hold the same model: config, files, tensors, recipe."""
        return not (self.recipe or self.config or self.files or self.tensors)


@dataclass(frozen=True, slots=True)
class _Side:
    path: Path
    manifest: Manifest | None
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    scores: dict[str, Any]


def diff(a: str | Path, b: str | Path) -> Diff:
    """Compare two directories, each an artifact or a model with safetensors weights.

    Raises UserError if one is neither, IntegrityError if one is damaged: artifacts are hashed whole, other models only
    where tensors of equal shape have to be compared.
    """
    left, right = _open(a), _open(b)
    result = Diff(left.path, right.path)
    result.config = list(changes(left.config, right.config))
    result.tensors = tensor_changes(left.tensors, right.tensors, _known_hashes(left), _known_hashes(right))
    result.sizes = list(changes(_sizes(left), _sizes(right)))
    result.scores = list(changes(left.scores, right.scores))
    if left.manifest is not None and right.manifest is not None:
        result.recipe = list(changes(left.manifest.recipe, right.manifest.recipe))
        result.made_with = list(changes(_made_with(left.manifest), _made_with(right.manifest)))
        result.files = list(changes(_other_files(left), _other_files(right)))
    return result


def changes(a: Any, b: Any, where: str = "") -> Iterator[Change]:
    """The leaves at which two JSON values differ, in order of their dotted paths."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted({*a, *b}, key=natural_key):
            yield from changes(a.get(key), b.get(key), f"{where}.{key}" if where else key)
    elif isinstance(a, list) and isinstance(b, list):
        for index in range(max(len(a), len(b))):
            left, right = (items[index] if index < len(items) else None for items in (a, b))
            yield from changes(left, right, f"{where}.{index}" if where else str(index))
    elif a != b:
        yield Change(where, a, b)


def _open(path: str | Path) -> _Side:
    directory = follow_latest(Path(path))
    artifact = Artifact.open(directory) if is_artifact(directory) else None
    if artifact:
        require_sound(directory, scores=False)  # what is compared below are the manifest's hashes
    files = artifact.weight_files if artifact else sorted(directory.glob("*.safetensors"))
    if not files or not (directory / CONFIG_NAME).is_file():
        raise UserError(
            f"{path} is neither an artifact nor a model directory with safetensors weights",
            "give two directories, each with config.json and weights",
        )
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing", f"see `compress verify {path}`")
        tensors.update(read_header(file))
    return _Side(
        path=directory,
        manifest=artifact.manifest if artifact else None,
        config=artifact.config if artifact else _config(directory / CONFIG_NAME),
        tensors=tensors,
        scores=_scores(artifact),
    )


def _config(path: Path) -> Any:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON: {error}", "restore it from the model's source") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object", "restore it from the model's source")
    return value


def _scores(artifact: Artifact | None) -> dict[str, Any]:
    record = artifact.eval() if artifact else None
    return {name: score.value for name, score in headline_scores(record).items()}


def _known_hashes(side: _Side) -> dict[str, str]:
    if side.manifest is None:
        return {}
    return {name: record.sha256 for name, record in side.manifest.tensors.items()}


def _sizes(side: _Side) -> dict[str, Any]:
    if side.manifest is not None:
        return side.manifest.sizes.model_dump()
    return {"bytes": sum(file.stat().st_size for file in {tensor.file for tensor in side.tensors.values()})}


def _made_with(manifest: Manifest) -> dict[str, Any]:
    fields = {"parents", "calibration", "environment", "created_with", "fallbacks"}
    return manifest.model_dump(mode="json", include=fields)


def _other_files(side: _Side) -> dict[str, str]:
    """Hashes of the files that are neither weights nor compared by content: tokenizer, generation config ..."""
    assert side.manifest is not None
    compared = (CONFIG_NAME, "recipe.yaml", "model.safetensors.index.json")
    return {
        name: sha256_file(side.path / name) if (side.path / name).is_file() else "missing"
        for name in side.manifest.files
        if not name.endswith(".safetensors") and name not in compared
    }

"""`compress_manifest.json`: what an artifact is, how it was made, and the hash of everything in it.

Two digests close it. `artifact_id` is the identity of the compressed model: a hash over config, tokenizer and
other source files, weights, recipe and ledger, and over nothing that varies between two equal runs (time,
machine, scores). `manifest_sha256` covers every other field, so that an edit to any of them is found.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from compress.artifact.canonical import sha256_json
from compress.artifact.ledger import LedgerEntry, Sha256
from compress.errors import IntegrityError

MANIFEST_NAME = "compress_manifest.json"
CONFIG_NAME = "config.json"
RECIPE_NAME = "recipe.yaml"
LAYERS_NAME = "layers.json"
CARD_NAME = "README.md"
EVAL_NAME = "eval.json"
SAMPLES_NAME = "samples.jsonl.gz"
INDEX_NAME = "model.safetensors.index.json"

Count = Annotated[int, Field(ge=0)]
FileName = Annotated[str, Field(pattern=r"^[^./\\\x00][^/\\\x00]*$")]
"""A file right inside the artifact: no path can lead out of it."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileRecord(_Record):
    """A file of the artifact: its hash and its size in bytes."""

    sha256: Sha256
    bytes: Count


class TensorRecord(_Record):
    """An output tensor: safetensors dtype name, shape, hash of its bytes, and the weight file it lies in."""

    dtype: str
    shape: list[Count]
    sha256: Sha256
    file: FileName


class Parent(_Record):
    """One step of the lineage. `digest` is a model hash or an artifact_id; `stage` is what was done to this parent.

    `bytes` is the size of its weight files.
    """

    kind: Literal["model", "artifact"]
    name: str
    digest: str
    stage: str
    bytes: Count


class CalibrationPart(_Record):
    """One source of the calibration tokens.

    `kind`: text, rows, chat or tokens; `sha256`: of the file, or of the rows that were fetched.
    """

    name: str
    kind: str
    sha256: Sha256
    samples: Count


class CalibrationRecord(_Record):
    """The calibration tokens: name of the source or mix, fingerprint of the token ids, how many sequences of what
    length, seed, and what each source gave (None in artifacts made before this was recorded)."""

    name: str
    sha256: Sha256
    samples: Count
    seq_len: Count
    seed: int
    parts: list[CalibrationPart] | None = None

    @model_serializer(mode="wrap")
    def _spelled(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `parts` where they are not known, as such manifests were written."""
        return {key: value for key, value in handler(self).items() if key != "parts" or value is not None}


class Fallback(_Record):
    """Something was not done as asked: for which tensor or linear, what was done instead, and why."""

    name: str
    action: str
    reason: str


class SizesRecord(_Record):
    """Sizes after compression.

    `bytes`: weight files. `parameters`: source weights that the output represents. `bits_per_weight`: stored bits
    (codes, scales, zero points) per weight of the quantised linears, null if none. `file_bits_per_weight`: stored
    tensor bits per parameter. Ratios: `bytes` as a share of the parent's and of the root's weight files.
    """

    bytes: Count
    parameters: Count
    quantized_parameters: Count
    bits_per_weight: float | None
    file_bits_per_weight: float
    ratio_to_parent: float
    ratio_to_root: float


class Manifest(_Record):
    """The manifest. Build one with `seal`; read one with `parse`."""

    schema_version: Literal[1]
    artifact_id: Sha256
    manifest_sha256: Sha256
    version: Annotated[int, Field(ge=1)]
    created: str
    created_with: str
    parents: Annotated[list[Parent], Field(min_length=1)]  # root first, the immediate parent last
    recipe: dict[str, JsonValue]
    recipe_hash: str
    identity_sha256: Sha256  # of all that had to be equal for a killed run to be resumed
    calibration: CalibrationRecord | None
    sizes: SizesRecord
    fallbacks: list[Fallback]
    environment: dict[str, str]
    attachments: dict[FileName, Sha256]
    files: dict[FileName, FileRecord]
    ledger: dict[str, LedgerEntry]
    tensors: dict[str, TensorRecord]

    @classmethod
    def seal(cls, **fields: Any) -> Manifest:
        """A manifest of `fields`, all but the schema version and the two digests, which are computed here."""
        blank = "0" * 64
        draft = cls(schema_version=1, artifact_id=blank, manifest_sha256=blank, **fields)
        draft = draft.model_copy(update={"artifact_id": draft.expected_artifact_id()})
        return draft.model_copy(update={"manifest_sha256": draft.expected_digest()})

    @classmethod
    def parse(cls, data: bytes, path: Path) -> Manifest:
        """The manifest in `data`, its own digests checked. Raises IntegrityError naming `path`."""
        manifest, problems = cls.examine(data)
        if manifest is None or problems:
            raise IntegrityError(
                f"{path} is damaged or was edited: {'; '.join(problems)}", "make or fetch the artifact again"
            )
        return manifest

    @classmethod
    def examine(cls, data: bytes) -> tuple[Manifest | None, list[str]]:
        """The manifest if `data` can be read as one at all, and everything wrong with it in words."""
        try:
            manifest = cls.model_validate_json(data)
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors()[:5]]
            return None, ["the manifest cannot be read: " + "; ".join(faults)]
        problems = []
        if manifest.artifact_id != manifest.expected_artifact_id():
            problems.append("artifact_id is not the hash of config, tokenizer, weights, recipe and ledger")
        if manifest.manifest_sha256 != manifest.expected_digest():
            problems.append("manifest_sha256 is not the hash of the other fields: some field was edited")
        if not problems and data != manifest.to_bytes():
            problems.append("the manifest is not spelled as it was written: some byte was changed")
        return manifest, problems

    def expected_artifact_id(self) -> str:
        """The artifact_id that the other fields give."""
        files = {
            name: record.sha256
            for name, record in self.files.items()
            if not name.endswith(".safetensors") and name not in (INDEX_NAME, RECIPE_NAME)
        }
        tensors = {name: [record.dtype, record.shape, record.sha256] for name, record in self.tensors.items()}
        ledger = {name: entry.model_dump() for name, entry in self.ledger.items()}
        # Where the source lay is not part of what was made of it.
        recipe = {key: value for key, value in self.recipe.items() if key != "model"}
        return sha256_json({"files": files, "tensors": tensors, "recipe": recipe, "ledger": ledger})

    def expected_digest(self) -> str:
        """The manifest_sha256 that the other fields give."""
        return sha256_json(self.model_dump(mode="json", exclude={"manifest_sha256"}))

    def with_attachments(self, added: Mapping[str, str], without: Collection[str] = ()) -> Manifest:
        """The same manifest with attachments (name -> sha256) added or replaced, others dropped; artifact_id stays."""
        kept = {name: sha256 for name, sha256 in self.attachments.items() if name not in without}
        together = dict(sorted({**kept, **added}.items()))
        draft = self.model_copy(update={"attachments": together})
        return draft.model_copy(update={"manifest_sha256": draft.expected_digest()})

    def to_bytes(self) -> bytes:
        """The file's bytes: JSON with one line per field, and one per file, tensor and ledger entry."""
        lines = []
        for key, value in self.model_dump(mode="json").items():
            if isinstance(value, dict) and value and all(isinstance(item, dict) for item in value.values()):
                rows = ",\n".join(f"  {_json(name)}: {_json(item)}" for name, item in value.items())
                lines.append(f" {_json(key)}: {{\n{rows}\n }}")
            else:
                lines.append(f" {_json(key)}: {_json(value)}")
        return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)

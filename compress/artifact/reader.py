"""`Artifact`: a finished artifact directory, read and never written."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from compress.artifact.canonical import sha256_bytes
from compress.artifact.cut import CUT_NAME
from compress.artifact.drafting import DRAFT_NAME
from compress.artifact.kernel_record import KERNELS_NAME
from compress.artifact.manifest import (
    CONFIG_NAME,
    EVAL_NAME,
    LAYERS_NAME,
    MANIFEST_NAME,
    RECIPE_NAME,
    Manifest,
)
from compress.artifact.summary import recipe_summary
from compress.artifact.training import TRAINING_NAME
from compress.errors import IntegrityError, UserError

LATEST = "latest"


class Artifact:
    """An artifact: `path` (its directory) and `manifest`. Make one with `Artifact.open`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path) -> Artifact:
        """Open an artifact directory, or the `latest` beside its versions.

        Only the manifest is read and checked; `verify` checks the rest. Raises UserError if there is no artifact,
        IntegrityError if its manifest is damaged or was edited.
        """
        directory = follow_latest(Path(path))
        data = _manifest_bytes(directory)
        if data is None:
            raise UserError(f"{path} is not an artifact: {_why_not(directory)}", "`compress list` shows what there is")
        return cls(directory, Manifest.parse(data, directory / MANIFEST_NAME))

    def __repr__(self) -> str:
        return f"Artifact({str(self.path)!r}, {self.artifact_id[:12]})"

    @property
    def artifact_id(self) -> str:
        """The hash that names the compressed model."""
        return self.manifest.artifact_id

    @property
    def method(self) -> str:
        """The methods of the recipe's stages, e.g. `awq`."""
        return recipe_summary(self.manifest.recipe).method

    @property
    def scheme(self) -> str:
        """The numeric layout, e.g. `w4a16-g128`."""
        return recipe_summary(self.manifest.recipe).scheme

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json. Raises IntegrityError if it is not as the manifest says."""
        value: dict[str, Any] = json.loads(self._checked(CONFIG_NAME, self.manifest.files[CONFIG_NAME].sha256))
        return value

    @property
    def recipe_text(self) -> str:
        """recipe.yaml, runnable by `compress run`. Raises IntegrityError if it is not as the manifest says."""
        return self._checked(RECIPE_NAME, self.manifest.files[RECIPE_NAME].sha256).decode()

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files, in order."""
        return sorted(self.path / name for name in {record.file for record in self.manifest.tensors.values()})

    def layers(self) -> list[dict[str, Any]]:
        """layers.json: one record per linear (see `LayerRecord`); empty if it was never attached."""
        data = self.attachment(LAYERS_NAME)
        records: list[dict[str, Any]] = json.loads(data) if data is not None else []
        return records

    def eval(self) -> dict[str, Any] | None:
        """eval.json, or None if the artifact was not scored."""
        data = self.attachment(EVAL_NAME)
        return None if data is None else json.loads(data)

    def training(self) -> dict[str, Any] | None:
        """training.json (see `TrainingRecord`), or None if nothing was trained."""
        data = self.attachment(TRAINING_NAME)
        return None if data is None else json.loads(data)

    def cut(self) -> dict[str, Any] | None:
        """cut.json (see `CutRecord`), or None if nothing was cut and repaired."""
        data = self.attachment(CUT_NAME)
        return None if data is None else json.loads(data)

    def draft(self) -> dict[str, Any] | None:
        """draft.json (see `DraftRecord`), or None if it was not measured as a draft."""
        data = self.attachment(DRAFT_NAME)
        return None if data is None else json.loads(data)

    def kernels(self) -> dict[str, Any] | None:
        """kernels.json (see `KernelRecord`), or None where it was not measured."""
        data = self.attachment(KERNELS_NAME)
        return None if data is None else json.loads(data)

    def attachment(self, name: str) -> bytes | None:
        """The bytes of an attachment, or None if there is none. Raises IntegrityError if its hash is wrong."""
        sha256 = self.manifest.attachments.get(name)
        return None if sha256 is None else self._checked(name, sha256)

    def _checked(self, name: str, sha256: str) -> bytes:
        path = self.path / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise IntegrityError(
                f"{path} cannot be read: {error.strerror}", f"see `compress verify {self.path}`"
            ) from None
        if sha256_bytes(data) != sha256:
            raise IntegrityError(f"{path} is not what the manifest says", f"see `compress verify {self.path}`")
        return data


def is_artifact(path: Path) -> bool:
    """Whether `path` is a directory with a manifest, sound or not."""
    return (path / MANIFEST_NAME).is_file()


def follow_latest(path: Path) -> Path:
    """`path`, or the version it names where `latest` is a small file because links are impossible."""
    if path.name == LATEST and path.is_file():
        version = path.read_text(encoding="utf-8").strip()
        if version and Path(version).name == version:
            return path.parent / version
    return path


def _manifest_bytes(directory: Path) -> bytes | None:
    try:
        return (directory / MANIFEST_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        raise UserError(
            f"{directory / MANIFEST_NAME} cannot be read: {error.strerror}", "check the path and its permissions"
        ) from None


def _why_not(directory: Path) -> str:
    if not directory.exists():
        return "there is nothing there"
    return f"it holds no {MANIFEST_NAME}" if directory.is_dir() else "it is a file"

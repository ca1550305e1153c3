"""What was scored and where: the model's hash and size, the versions and the device."""

from __future__ import annotations

import platform
import re
from importlib import metadata
from pathlib import Path

import torch

import compress
from compress.artifact.reader import Artifact, is_artifact
from compress.evaluation.records import EnvironmentRecord, ModelRecord
from compress.evaluation.scheme import scheme_of
from compress.models.checkpoint import Checkpoint
from compress.runtime.protocol import Runtime

_PACKAGES = ("torch", "transformers", "compressed-tensors", "tokenizers", "numpy")


def artifact_id(path: Path) -> str | None:
    """The artifact_id of an artifact, None for any other model."""
    return Artifact.open(path).artifact_id if is_artifact(path) else None


def model_record(runtime: Runtime) -> ModelRecord:
    """The record of a loaded model; reads and hashes its weight files."""
    checkpoint = Checkpoint.open(runtime.path)
    shards = {info.shard for info in checkpoint.index.values()}
    weights_bytes = sum((checkpoint.path / shard).stat().st_size for shard in shards)
    parameters = runtime.parameters()
    return ModelRecord(
        name=_name(checkpoint.path.resolve()),
        digest=checkpoint.digest(),
        quantized=bool(checkpoint.config.get("quantization_config")),
        scheme=scheme_of(checkpoint.config),
        weights_bytes=weights_bytes,
        parameters=parameters,
        bits_per_weight=round(8 * checkpoint.nbytes / parameters, 6),
        tokenizer_sha256=runtime.tokenizer_digest(),
    )


def _name(path: Path) -> str:
    """The directory's name; with its parent's where it is only a version, as in `tales-6m-awq-w4a16-g128/v3`."""
    return f"{path.parent.name}/{path.name}" if re.fullmatch(r"v\d+", path.name) else path.name


def environment_record(runtime: Runtime) -> EnvironmentRecord:
    """The record of the software and hardware that a loaded model runs on."""
    return EnvironmentRecord(
        runtime=runtime.name,
        kernel=runtime.kernel,
        device=runtime.device,
        dtype=runtime.dtype,
        threads=torch.get_num_threads(),
        machine=platform.machine(),
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Versions of the software that decides numbers."""
    return {
        "compress": compress.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _PACKAGES},
    }

"""The model under test, opened: a directory or an artifact in a runtime, or an address that a server answers at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.errors import UserError
from compress.evaluation.identity import artifact_id, environment_record, model_record, versions
from compress.evaluation.record_parts import EnvironmentRecord, ModelRecord
from compress.evaluation.scoring_kernel import open_runtime
from compress.runtime.protocol import Runtime

if TYPE_CHECKING:
    from compress.evaluation.harness.endpoint import Endpoint


@dataclass(frozen=True, slots=True)
class Opened:
    """A model to score, what the record says of it, and the artifact it is, if it is one."""

    runtime: Runtime | Endpoint
    model: ModelRecord
    environment: EnvironmentRecord
    artifact_id: str | None

    def identity(self) -> dict[str, Any]:
        """Everything besides the question that decides what the model answers, as plain data."""
        return {"model": self.model.digest, **self.environment.model_dump(mode="json")}

    def local(self, what: str) -> Runtime:
        """The runtime; raises UserError where the model is behind an address, since `what` needs its logits."""
        if isinstance(self.model.tokenizer_sha256, str):
            return self.runtime  # type: ignore[return-value]
        raise UserError(
            f"{self.model.name} is behind an address, and {what} need a model's own files",
            "name tasks alone (--tasks a,b), or give a model directory",
        )


def open_model(path: str | Path, device: str, dtype: str, kernel: str) -> Opened:
    """Opens a model directory, an artifact or an address.

    kernel: as `chosen_kernel` gives it, which has checked the files; what answers at an address has its own.

    Raises:
        UserError: no such model, server, device or dtype, or a model that the engine does not compute with the kernel.
        IntegrityError: damaged files.
        WorkError: out of memory, or a server that fails.
    """
    from compress.evaluation.harness.endpoint import is_endpoint, open_endpoint

    if is_endpoint(path):
        return _served(open_endpoint(str(path)))
    runtime = open_runtime(path, device, dtype, kernel)
    return Opened(runtime, model_record(runtime), environment_record(runtime), artifact_id(runtime.path))


def _served(endpoint: Endpoint) -> Opened:
    model = ModelRecord(
        name=endpoint.path,
        digest=endpoint.digest,
        quantized=False,
        scheme="unknown",
        weights_bytes=None,
        parameters=None,
        bits_per_weight=None,
        tokenizer_sha256=None,
    )
    environment = EnvironmentRecord(
        runtime=endpoint.name,
        kernel=endpoint.kernel,
        device="remote",
        dtype="unknown",
        threads=torch.get_num_threads(),
        machine="remote",
        versions=versions(),
    )
    return Opened(endpoint, model, environment, None)

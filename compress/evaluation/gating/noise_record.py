"""The noise floor as a file: what a model measures against itself when only the batch and the threads differ."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from compress.artifact import durable
from compress.artifact.canonical import canonical_json, sha256_json
from compress.errors import IntegrityError, UserError
from compress.evaluation.record_base import Digest, IntervalRecord, _Record
from compress.evaluation.record_parts import EnvironmentRecord


class NoiseRecord(_Record):
    """`values`: measure -> estimate and bounds, such as `kl_mean`, `ppl_ratio` (an increase) or `flips:blimp`.

    `digest` is the model's, `data` the hashes of the tokens and prompts it was measured on, `variation` what differed
    between the two passes.
    """

    schema_version: Literal[1] = 1
    kind: Literal["compress.noise"] = "compress.noise"
    model: str
    digest: Digest
    environment: EnvironmentRecord
    data: dict[str, str]
    variation: str
    values: dict[str, IntervalRecord]
    created: datetime.date
    sha256: Digest = "0" * 64

    def sealed(self) -> NoiseRecord:
        """The same record with `sha256` set to the hash of all its other fields."""
        return self.model_copy(update={"sha256": self.expected_sha256()})

    def expected_sha256(self) -> str:
        """What `sha256` must be."""
        return sha256_json(self.model_dump(mode="json", exclude={"sha256"}))

    def largest(self) -> dict[str, float]:
        """Measure -> the end that lies farther from nothing: what a gate must allow at least."""
        return {name: max(abs(value.low), abs(value.high)) for name, value in self.values.items()}

    def floor(self) -> str:
        """`kl_mean 1.2e-09, ppl_ratio 3.1e-08 (1 and 3 windows per batch ...)`."""
        return ", ".join(f"{name} {value:.2g}" for name, value in self.largest().items()) + f" ({self.variation})"

    def key(self) -> str:
        """Names the environment and the model: the floor holds for no other."""
        return noise_key(self.digest, self.environment)


def noise_key(digest: str, environment: EnvironmentRecord) -> str:
    """Hash of a model and of all in an environment that changes its arithmetic."""
    versions = {name: environment.versions.get(name) for name in ("torch", "transformers", "compress")}
    return sha256_json([digest, {**environment.arithmetic(), "machine": environment.machine}, versions])


def write_noise(record: NoiseRecord, path: Path) -> None:
    """Writes the file so that a reader sees the old one or the whole new one; raises WorkError where it cannot."""
    durable.write_atomic(path, canonical_json(record.model_dump(mode="json")) + b"\n")


def read_noise(path: Path) -> NoiseRecord:
    """The record in a file. Raises UserError where there is none, IntegrityError where it is damaged or edited."""
    try:
        record = NoiseRecord.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"cannot read the noise floor {path}: {error.strerror}", "measure it: `compress gate --noise-floor`"
        ) from error
    except ValidationError:
        raise IntegrityError(
            f"{path} is not a whole noise floor", "measure it again: `compress gate --noise-floor`"
        ) from None
    if record.sha256 != record.expected_sha256():
        raise IntegrityError(f"{path} was edited: its sha256 is not that of its contents", "measure it again")
    return record

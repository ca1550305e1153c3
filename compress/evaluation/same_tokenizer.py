"""Two models can be compared only if they read a text into the same tokens. Free of torch."""

from __future__ import annotations

from compress.errors import IntegrityError
from compress.evaluation.record_parts import ModelRecord


def require_same_tokenizer(candidate: ModelRecord, baseline: ModelRecord) -> None:
    """Raises IntegrityError where both tokenizers are known and differ; a model behind an address shows none."""
    ours, theirs = candidate.tokenizer_sha256, baseline.tokenizer_sha256
    if ours is not None and theirs is not None and ours != theirs:
        raise different_tokenizers(candidate.name, baseline.name)


def different_tokenizers(candidate: object, baseline: object) -> IntegrityError:
    """The error that names the two."""
    return IntegrityError(
        f"{candidate} and {baseline} have different tokenizers",
        "scores are comparable only between models that read a text into the same tokens: give the model that this "
        "one was made from",
    )

"""Models of the native back end, texts for them, and how far two predictions are apart."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from compress.runtime import loading
from compress.runtime.native_backend import NativeRuntime
from compress.runtime.protocol import Generation, SamplingParams

GREEDY = SamplingParams(max_tokens=24, ignore_end=True)
PROMPTS = ("Once upon a time", "The king said to his daughter that she", "A", "There was once a poor woman who had")


def native(path: Path, kernel: str = "cpu") -> NativeRuntime:
    runtime = loading.load(path, device="cpu", kernel=kernel)
    assert isinstance(runtime, NativeRuntime)
    return runtime


def divergence(found: Tensor, expected: Tensor) -> float:
    """Mean KL in nats to the expected predictions."""
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def windows(runtime: NativeRuntime, count: int = 2, length: int = 100) -> Tensor:
    ids = runtime.encode((Path(__file__).parents[2] / "README.md").read_text())
    return torch.tensor(ids[: count * length]).reshape(count, length)


def tokens_and_logprobs(answers: list[Generation]) -> list[tuple[object, ...]]:
    return [(answer.token_ids, answer.logprobs, answer.finish_reason) for answer in answers]

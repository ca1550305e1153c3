"""Models of the native back end, texts for them, and how far two predictions are apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from compress.runtime import loading
from compress.runtime.native_backend import NativeRuntime
from compress.runtime.native_model import NativeModel
from compress.runtime.paged_model import Chunk
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


def grouping_does_not_show(model: NativeModel, rows: list[list[int]], sizes: Sequence[int]) -> None:
    """Logits of sequences of one length are the same bits in parts of these sizes, together, and on many threads."""
    length = len(rows[0])
    with model.pages.lend(length) as pages:
        whole = [model.sequence(row, 0, pages, range(length)) for row in rows]
        for size in sizes:
            cut = [(rows[0][at : at + size], at) for at in range(0, length, size)]
            parts = [model.sequence(part, at, pages, range(len(part))) for part, at in cut]
            assert torch.equal(torch.cat(parts), whole[0])
    tables = [model.pages.take(length) for _ in rows]
    together = model.step([Chunk(row, 0, table, range(length)) for row, table in zip(rows, tables, strict=True)])
    assert torch.equal(together, torch.cat(whole))
    torch.set_num_threads(3)
    assert torch.equal(model.step([Chunk(rows[1], 0, tables[1], range(length))]), whole[1])
    for table in tables:
        model.pages.give_back(table)

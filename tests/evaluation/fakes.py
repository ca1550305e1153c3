"""A runtime whose logits are a table look-up: fast, exact, and changed at will."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from compress.runtime.protocol import Generation, SamplingParams


class TableRuntime:
    """Logits depend on the current token alone: `table` (vocab, vocab). Texts are read as one token per byte."""

    name = "table"
    kernel = "table"
    path = Path("table")
    device = "cpu"
    dtype = "float32"
    batched_generate = deterministic = False

    def __init__(self, vocab: int = 300, seed: int = 0, *, context: int | None = 32, prefix: int | None = 299) -> None:
        self.table = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed)) * 2
        self.context_length = context
        self.vocab_size = vocab
        self.prefix_id = prefix
        self.batches: list[int] = []

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode()

    def tokenizer_digest(self) -> str:
        return "0" * 64

    def parameters(self) -> int:
        return self.table.numel()

    def score(self, token_ids: Tensor) -> Tensor:
        self.batches.append(len(token_ids))
        return self.table[token_ids]

    def generate(self, prompts: Sequence[str], params: SamplingParams) -> list[Generation]:
        return [Generation("ab", (97,) * params.max_tokens, "length", len(p), 0.5, 2.0) for p in prompts]

"""Training text as token windows: read once, cut anew on each pass, the same for the same seed."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor


def read_pieces(path: Path, limit: int | None = None) -> list[str]:
    """The texts of a UTF-8 file, plain or .xz, between empty lines; `limit` characters of the file at most."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as handle:
        text = handle.read(limit) if limit else handle.read()
    return [piece + "\n\n" for piece in text.split("\n\n") if piece]


def encoded(pieces: list[str], tokenizer_dir: Path) -> Tensor:
    """Token ids (n,) int64 of texts one after the other, without special tokens.

    Piece by piece, because one string of 50 MB would take gigabytes in the tokenizer.
    """
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    found = tokenizer.encode_batch(pieces, add_special_tokens=False)
    return torch.from_numpy(np.concatenate([np.asarray(e.ids, dtype=np.int64) for e in found]))


def read_tokens(path: Path, tokenizer_dir: Path, limit: int | None = None) -> Tensor:
    """Token ids (n,) int64 of a UTF-8 text, plain or .xz, without special tokens; `limit` characters at most."""
    return encoded(read_pieces(path, limit), tokenizer_dir)


class Windows:
    """Training windows by running number: pass k over the text is cut at a random offset and shuffled by (seed, k)."""

    def __init__(self, ids: Tensor, bos: int, context: int, seed: int) -> None:
        self.ids, self.bos, self.context, self.seed = ids, bos, context, seed
        self.count = len(ids) // context - 1
        if self.count < 1:
            raise SystemExit(f"error: the text has {len(ids)} tokens, training needs at least {2 * context}")
        self._pass, self._offset, self._order = -1, 0, torch.empty(0)

    def batch(self, first: int, size: int) -> Tensor:
        """Windows first .. first + size - 1 as (size, 1 + context): BOS and `context` tokens to predict."""
        rows = []
        for number in range(first, first + size):
            if number // self.count != self._pass:
                self._pass = number // self.count
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self._pass)
                self._offset = int(torch.randint(self.context, (1,), generator=generator))
                self._order = torch.randperm(self.count, generator=generator)
            start = self._offset + int(self._order[number % self.count]) * self.context
            rows.append(self.ids[start : start + self.context])
        return with_bos(torch.stack(rows), self.bos)


def with_bos(body: Tensor, bos: int) -> Tensor:
    """(windows, tokens) -> (windows, 1 + tokens)."""
    return torch.cat([torch.full((len(body), 1), bos, dtype=body.dtype), body], dim=1)


def leading_windows(ids: Tensor, bos: int, context: int, tokens: int) -> Tensor:
    """The first windows (count, 1 + context) of a text, `tokens` tokens at most."""
    count = min(tokens, len(ids)) // context
    return with_bos(ids[: count * context].view(count, context), bos)

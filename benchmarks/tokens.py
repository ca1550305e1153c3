"""Token files for benchmarks: calibration samples that both tools read, and held-out windows.

Every window is BOS followed by consecutive tokens of the text. Calibration windows (BOS and seq_len - 1 tokens, so that
they fill the context) are drawn without replacement by a seed from the calibration text. Held-out windows are the first
ones of the held-out text, in order: BOS and seq_len tokens, each of which is predicted once from a context of at most
seq_len tokens.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

Corpus = tuple[str, str]
"""Calibration and held-out text, relative to the shared data directory."""

CORPORA: dict[str, Corpus] = {
    "tales": ("tales/tales_calib.txt", "tales/tales_test.txt"),
    "tinystories": ("tinystories/tinystories_calib.txt", "tinystories/tinystories_val.txt"),
    "wikitext": ("wikitext-2-raw/wiki.valid.raw", "wikitext-2-raw/wiki.test.raw"),
}


def collapse(text: str) -> str:
    """The text with blank lines removed."""
    return re.sub(r"\n+", "\n", text)


def encode(text_file: Path, tokenizer_dir: Path, collapse_newlines: bool = False) -> np.ndarray:
    """Token ids (n,) int64 of a whole text without special tokens.

    `collapse_newlines` turns blank lines into single newlines: the stories models were trained so.
    """
    text = text_file.read_text(encoding="utf-8")
    if collapse_newlines:
        text = collapse(text)
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def windows(ids: np.ndarray, bos: int, length: int) -> np.ndarray:
    """All full windows (count, 1 + length) in text order, each BOS and `length` tokens; a shorter rest is dropped."""
    count = len(ids) // length
    body = ids[: count * length].reshape(count, length)
    return np.concatenate([np.full((count, 1), bos, dtype=np.int64), body], axis=1)


def calibration_windows(ids: np.ndarray, bos: int, samples: int, seq_len: int, seed: int) -> np.ndarray:
    """`samples` distinct windows (samples, seq_len) drawn by `seed`. ValueError when the text has fewer."""
    every = windows(ids, bos, seq_len - 1)
    if len(every) < samples:
        raise ValueError(f"the calibration text has {len(every)} windows of {seq_len} tokens, {samples} are wanted")
    return every[np.random.default_rng(seed).permutation(len(every))[:samples]]


def held_out_windows(ids: np.ndarray, bos: int, seq_len: int, tokens: int) -> np.ndarray:
    """The first windows (count, 1 + seq_len) with `tokens` tokens to score, or ValueError for a short text."""
    count = -(-tokens // seq_len)
    every = windows(ids, bos, seq_len)
    if len(every) < count:
        raise ValueError(f"the held-out text has {len(every) * seq_len} tokens in full windows, {tokens} are wanted")
    return every[:count]


def save(tokens: np.ndarray, path: Path) -> None:
    """Write token ids (samples, seq) int64 as the tensor `tokens` of a safetensors file, which both tools read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"tokens": np.ascontiguousarray(tokens)}, path)

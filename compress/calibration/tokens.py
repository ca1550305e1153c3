"""Calibration tokens: windows of one length from one source or a mix, drawn by seed, with a fingerprint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.calibration import windows
from compress.calibration.mix import (
    Part,
    counts,
    is_hub_name,
    packaged,
    packaged_names,
    parse_mix,
    short_name,
    spell,
)
from compress.calibration.rows import decoded, fetch_rows, read_rows
from compress.errors import IntegrityError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROW_FILES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True, slots=True)
class DrawnPart:
    """What one source gave: `kind` text, rows, chat or tokens; `sha256` is over the file, or the rows fetched."""

    name: str
    kind: str
    sha256: str
    samples: int


@dataclass(frozen=True, eq=False, slots=True)
class CalibrationSet:
    """tokens (samples, seq_len) int64; `sha256` is over the tokens themselves, `name` that of the source or mix.

    counted: which tokens are to be learned (samples, seq_len) bool, in `sha256` too; None for all.
    """

    tokens: Tensor
    name: str
    sha256: str
    seed: int
    parts: tuple[DrawnPart, ...]
    counted: Tensor | None = None


def find(source: str) -> Path:
    """The file of a packaged text's name, or of a path. Raises UserError when neither exists."""
    path = packaged(source) or Path(source)
    if path.is_file():
        return path
    raise UserError(
        f"calibration text {source!r} is neither a packaged name nor a file",
        f"packaged: {', '.join(packaged_names())}; or give the path of a text, JSONL or Parquet file, or org/name",
    )


def draw(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int | None,
    seq_len: int,
    seed: int,
    longest: int,
    vocabulary: int,
) -> CalibrationSet:
    """Draws `samples` windows of `seq_len` tokens (BOS included, where the tokenizer has one) without replacement.

    A text is cut into consecutive windows, which are shuffled by a generator of their own seeded with `seed`; for rows
    see `windows.of_rows`. A `.safetensors` file with a tensor `tokens` (samples, seq_len) is taken as it is, for
    comparisons with other tools. The windows of a mix are shuffled once more, so that any stretch of them is mixed.
    `samples` None: all windows that the one source has.

    Args:
        source: a packaged name, a file, a data set of the hub, or a mix of them (see `parse_mix`).
        longest: the context the model was trained for; longer windows are refused.
        vocabulary: rows of the model's embedding; token ids beyond them are refused.

    Raises:
        UserError: a source is missing, empty, of no known form, or too short; a share that gives no window; a window
            longer than the context; or a token id without a row in the embedding.
        IntegrityError: a `.safetensors` file cannot be read.
    """
    if seq_len > longest:
        raise UserError(
            f"calibration windows of {seq_len} tokens exceed the model's context of {longest}",
            f"use --seq-len {longest} or less",
        )
    parts = _parts(source)
    if samples is None and len(parts) > 1:
        raise UserError(f"{source!r} is a mix, of which not all windows can be taken", "say how many with --samples")
    shares = [None] if samples is None else counts(parts, samples)
    taken, drawn = [], []
    for part, count in zip(parts, shares, strict=True):
        if count == 0:
            raise UserError(
                f"{part.source}'s share of {samples} calibration windows is less than one",
                "give it a larger share, or more --samples",
            )
        tokens, record = _part(part.source, tokenizer, count, seq_len, seed)
        _refuse_unknown_ids(tokens, part.source, vocabulary)
        taken.append(tokens)
        drawn.append(record)
    tokens = torch.cat(taken)
    if len(parts) > 1:
        tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))].contiguous()
    digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    return CalibrationSet(tokens, spell(parts, placeless=True), digest, seed, tuple(drawn))


def _parts(source: str) -> tuple[Part, ...]:
    try:
        return parse_mix(source)
    except ValueError as error:
        raise UserError(f"calibration text {source!r} {error}", "name one source, or a mix: a:0.5,b:0.5") from None


def _part(
    source: str, tokenizer: PreTrainedTokenizerBase, samples: int | None, seq_len: int, seed: int
) -> tuple[Tensor, DrawnPart]:
    """The windows of one source, and what is recorded of it."""
    name = short_name(source)
    if packaged(source) is None and is_hub_name(source):
        rows = fetch_rows(source)
        tokens = windows.of_rows(rows, source, tokenizer, samples, seq_len, seed)
        return tokens, DrawnPart(name, rows.kind, rows.sha256, len(tokens))
    path = find(source)
    if path.suffix in ROW_FILES:
        rows = read_rows(path)
        tokens = windows.of_rows(rows, str(path), tokenizer, samples, seq_len, seed)
        return tokens, DrawnPart(name, rows.kind, rows.sha256, len(tokens))
    raw = path.read_bytes()
    sha256 = hashlib.sha256(raw).hexdigest()
    if path.suffix == ".safetensors":
        tokens = _read_tokens(path, samples, seq_len)
        return tokens, DrawnPart(name, "tokens", sha256, len(tokens))
    tokens = windows.of_text(decoded(raw, path), str(path), tokenizer, samples, seq_len, seed)
    return tokens, DrawnPart(name, "text", sha256, len(tokens))


def _read_tokens(path: Path, samples: int | None, seq_len: int) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            stored = file.get_tensor("tokens")
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"cannot read `tokens` from {path}: {error}", "write it again") from None
    samples = stored.shape[0] if samples is None else samples
    if stored.ndim != 2 or stored.shape[0] < samples or stored.shape[1] < seq_len:
        raise UserError(
            f"{path} holds tokens of shape {tuple(stored.shape)}, ({samples}, {seq_len}) are asked for",
            "lower --samples or --seq-len",
        )
    if stored.is_floating_point():
        raise UserError(f"{path} holds tokens of dtype {stored.dtype}", "write token ids as integers")
    return stored[:samples, :seq_len].to(torch.int64).contiguous()


def _refuse_unknown_ids(tokens: Tensor, source: str, vocabulary: int) -> None:
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= vocabulary:
        raise UserError(
            f"{source} has the token id {lowest if lowest < 0 else highest}, and the model knows 0 to {vocabulary - 1}",
            "use the tokenizer that belongs to the model",
        )

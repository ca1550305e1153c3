"""Calibration tokens: windows of one length cut from a text, drawn by seed, with a fingerprint of what was drawn."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress import content
from compress.errors import IntegrityError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False, slots=True)
class CalibrationSet:
    """tokens (samples, seq_len) int64; `sha256` is over the tokens themselves, `source_sha256` over the file."""

    tokens: Tensor
    name: str
    sha256: str
    source_sha256: str
    seed: int

    @property
    def fingerprint(self) -> dict[str, object]:
        """What the manifest records."""
        samples, seq_len = self.tokens.shape
        return {
            "name": self.name,
            "sha256": self.sha256,
            "source_sha256": self.source_sha256,
            "samples": samples,
            "seq_len": seq_len,
            "seed": self.seed,
        }


def packaged(source: str) -> Path | None:
    """The file of a packaged text's name; None of anything else."""
    path = content.calibration_dir() / f"{source}.txt"
    return path if Path(source).name == source and path.is_file() else None


def find(source: str) -> Path:
    """The file of a packaged text's name, or of a path. Raises UserError when neither exists."""
    path = packaged(source) or Path(source)
    if path.is_file():
        return path
    names = ", ".join(sorted(p.name[:-4] for p in content.calibration_dir().iterdir() if p.name.endswith(".txt")))
    raise UserError(
        f"calibration text {source!r} is neither a packaged name nor a file",
        f"packaged: {names}; or give the path of a UTF-8 text file",
    )


def draw(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    longest: int,
    vocabulary: int,
) -> CalibrationSet:
    """Draws `samples` windows of `seq_len` tokens (BOS included, where the tokenizer has one) without replacement.

    The text is cut into consecutive windows, which are shuffled by a generator of their own seeded with `seed`.
    A `.safetensors` file with a tensor `tokens` (samples, seq_len) is taken as it is, for comparisons with other tools.

    Args:
        longest: the context the model was trained for; longer windows are refused.
        vocabulary: rows of the model's embedding; token ids beyond them are refused.

    Raises:
        UserError: the text is missing, empty, not UTF-8 or too short, the window is longer than the context, or a token
            id has no row in the embedding.
        IntegrityError: a `.safetensors` file cannot be read.
    """
    if seq_len > longest:
        raise UserError(
            f"calibration windows of {seq_len} tokens exceed the model's context of {longest}",
            f"use --seq-len {longest} or less",
        )
    path = find(source)
    raw = path.read_bytes()
    name = path.stem
    source_sha256 = hashlib.sha256(raw).hexdigest()
    if path.suffix == ".safetensors":
        tokens = _read_tokens(path, samples, seq_len)
    else:
        tokens = _windows(raw, path, tokenizer, samples, seq_len, seed)
    _refuse_unknown_ids(tokens, path, vocabulary)
    digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    return CalibrationSet(tokens, name, digest, source_sha256, seed)


def _windows(
    raw: bytes, path: Path, tokenizer: PreTrainedTokenizerBase, samples: int, seq_len: int, seed: int
) -> Tensor:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"calibration text {path} is not UTF-8 (byte {error.start})", "convert it to UTF-8 first"
        ) from None
    if not text.strip():
        raise UserError(f"calibration text {path} is empty", "give a text with at least some thousand words")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    payload = seq_len - len(bos)
    available = len(ids) // payload if payload > 0 else 0
    if available < samples:
        raise UserError(
            f"calibration text {path} holds {available} windows of {seq_len} tokens, {samples} are asked for",
            ("" if available == 0 else f"use --samples {available}, or ") + "a shorter --seq-len, or a longer text",
        )
    windows = torch.tensor(ids[: available * payload], dtype=torch.int64).reshape(available, payload)
    chosen = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:samples]
    start = torch.tensor(bos, dtype=torch.int64).expand(samples, len(bos))
    return torch.cat([start, windows[chosen]], 1).contiguous()


def _read_tokens(path: Path, samples: int, seq_len: int) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            stored = file.get_tensor("tokens")
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"cannot read `tokens` from {path}: {error}", "write it again") from None
    if stored.ndim != 2 or stored.shape[0] < samples or stored.shape[1] < seq_len:
        raise UserError(
            f"{path} holds tokens of shape {tuple(stored.shape)}, ({samples}, {seq_len}) are asked for",
            "lower --samples or --seq-len",
        )
    if stored.is_floating_point():
        raise UserError(f"{path} holds tokens of dtype {stored.dtype}", "write token ids as integers")
    return stored[:samples, :seq_len].to(torch.int64).contiguous()


def _refuse_unknown_ids(tokens: Tensor, path: Path, vocabulary: int) -> None:
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= vocabulary:
        raise UserError(
            f"{path} has the token id {lowest if lowest < 0 else highest}, and the model knows 0 to {vocabulary - 1}",
            "use the tokenizer that belongs to the model",
        )

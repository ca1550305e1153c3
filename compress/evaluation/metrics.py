"""Scoring a candidate, and in lock-step a baseline, over token windows; only sums and one number per token are kept.

Both models see the same batch at the same time, so no logits are stored: memory is one batch of logits per model.
Log-probabilities are float32, sums over tokens float64 in a fixed order, so A against A gives a KL of exactly zero.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import IntegrityError, WorkError
from compress.evaluation.records import KL_THRESHOLDS, BlockSums, KlPercentiles
from compress.evaluation.windows import Windows
from compress.progress import NullProgress, Progress
from compress.runtime.protocol import Runtime

BATCH_ELEMENTS = 1 << 24  # logits of one forward pass
CHUNK_ELEMENTS = 1 << 22  # logits that the metrics look at together
CONFIDENT = 0.5  # the baseline is confident where its likeliest token has more than this probability


@dataclass(frozen=True, eq=False, slots=True)
class Scores:
    """What scoring gives. `seconds`: the candidate's forward passes. `kl_percentiles`: None without a baseline."""

    blocks: BlockSums
    kl_percentiles: KlPercentiles | None
    seconds: float


@dataclass(frozen=True, eq=False, slots=True)
class TokenScores:
    """Per scored token, on the CPU: nll float64, and where there is a baseline nll_baseline and kl float64, agree and
    confident bool."""

    nll: Tensor
    nll_baseline: Tensor | None = None
    kl: Tensor | None = None
    agree: Tensor | None = None
    confident: Tensor | None = None


def score(candidate: Runtime, baseline: Runtime | None, windows: Windows, progress: Progress | None = None) -> Scores:
    """Scores every window, several per forward pass.

    Raises:
        IntegrityError: the two models' vocabularies differ in size.
        WorkError: logits that are not finite.
    """
    progress = progress or NullProgress()
    batch = max(1, BATCH_ELEMENTS // (windows.seq_len * candidate.vocab_size))
    parts: list[TokenScores] = []
    seconds = 0.0
    progress.begin("scoring", -(-len(windows.tokens) // batch))
    for rows in windows.tokens.split(batch):
        start = time.perf_counter()
        logits = _logits(candidate, rows)
        seconds += time.perf_counter() - start
        parts.append(token_scores(rows, logits, None if baseline is None else _logits(baseline, rows)))
        progress.advance()
    progress.end()
    return _aggregate(parts, windows, seconds)


def token_scores(rows: Tensor, logits: Tensor, reference: Tensor | None) -> TokenScores:
    """Scores of one batch. rows (batch, seq) token ids; logits and the baseline's `reference` (batch, seq, vocab).

    KL is KL(baseline || candidate) in nats.
    """
    if reference is not None and reference.shape != logits.shape:
        raise IntegrityError(
            f"the vocabularies differ: {logits.shape[-1]} entries against the baseline's {reference.shape[-1]}",
            "a compressed model can only be compared with the model it was made from",
        )
    targets = rows[:, 1:].reshape(-1).to(logits.device)
    ours = logits[:, :-1].flatten(0, 1)
    theirs = None if reference is None else reference[:, :-1].flatten(0, 1)
    size = max(1, CHUNK_ELEMENTS // ours.shape[-1])
    chunks = [
        _chunk(targets[i : i + size], ours[i : i + size], None if theirs is None else theirs[i : i + size])
        for i in range(0, len(targets), size)
    ]
    return _concatenate(chunks)


def _chunk(targets: Tensor, logits: Tensor, reference: Tensor | None) -> TokenScores:
    ours = logits.float().log_softmax(-1)
    index = targets.unsqueeze(-1)
    nll = -ours.gather(-1, index).squeeze(-1).double().cpu()
    if reference is None:
        return TokenScores(nll)
    theirs = reference.float().log_softmax(-1)
    probabilities = theirs.exp()
    kl = (probabilities * (theirs - ours)).sum(-1)
    top = theirs.max(-1)
    return TokenScores(
        nll,
        nll_baseline=-theirs.gather(-1, index).squeeze(-1).double().cpu(),
        kl=kl.double().cpu(),
        agree=(top.indices == ours.argmax(-1)).cpu(),
        confident=(top.values.exp() > CONFIDENT).cpu(),
    )


def _logits(model: Runtime, rows: Tensor) -> Tensor:
    logits = model.score(rows)
    if not bool(torch.isfinite(logits).all()):
        raise WorkError(
            f"{model.path} gives logits that are not finite",
            "its weights hold NaN or overflow in this dtype: try --dtype float32, or make the model again",
        )
    return logits


def _concatenate(parts: list[TokenScores]) -> TokenScores:
    def joined(field: str) -> Tensor | None:
        values = [getattr(part, field) for part in parts]
        return None if values[0] is None else torch.cat(values)

    return TokenScores(
        torch.cat([part.nll for part in parts]), *(joined(f) for f in ("nll_baseline", "kl", "agree", "confident"))
    )


def _aggregate(parts: list[TokenScores], windows: Windows, seconds: float) -> Scores:
    tokens = _concatenate(parts)
    per_window = windows.seq_len - 1
    per_block = windows.per_block * per_window

    def block_sums(values: Tensor) -> list[float]:
        return [float(part.double().sum()) for part in values.split(per_block)]

    def block_counts(values: Tensor) -> list[int]:
        return [int(part.sum()) for part in values.split(per_block)]

    counted = [len(part) for part in tokens.nll.split(per_block)]
    nll = block_sums(tokens.nll)
    if tokens.kl is None or tokens.nll_baseline is None or tokens.agree is None or tokens.confident is None:
        return Scores(BlockSums(tokens=counted, nll=nll), None, seconds)
    above = torch.stack([tokens.kl > threshold for threshold in KL_THRESHOLDS], 1)
    blocks = BlockSums(
        tokens=counted,
        nll=nll,
        nll_baseline=block_sums(tokens.nll_baseline),
        kl=block_sums(tokens.kl),
        top1_agree=block_counts(tokens.agree),
        confident=block_counts(tokens.confident),
        confident_agree=block_counts(tokens.agree & tokens.confident),
        kl_above=[part.sum(0).tolist() for part in above.split(per_block)],
    )
    return Scores(blocks, percentiles(tokens.kl.numpy()), seconds)


def percentiles(kl: NDArray[np.float64]) -> KlPercentiles:
    """Percentiles of KL per token, rounding errors below zero shown as zero."""
    p50, p90, p99, p999 = (float(max(v, 0.0)) for v in np.percentile(kl, [50.0, 90.0, 99.0, 99.9]))
    return KlPercentiles(p50=p50, p90=p90, p99=p99, p999=p999, max=float(max(kl.max(), 0.0)))

"""Score token windows with one model or two in lock-step; only one row of numbers per token is kept.

Both models see the same batch at the same time, so no logits are stored: memory is one batch of logits per model.
Log-probabilities are float32, sums over tokens float64 in a fixed order, so A against A gives a KL of exactly zero.
Windows of like length are batched together; a shorter one is padded behind its end, which no token before can see.
"""

from __future__ import annotations

import time
from typing import Protocol

import torch
from torch import Tensor

from compress.errors import IntegrityError, WorkError
from compress.evaluation.token_sums import Scores, TokenScores, aggregate, concatenate
from compress.evaluation.windows import Windows
from compress.progress import NullProgress, Progress
from compress.runtime.protocol import Runtime

BATCH_ELEMENTS = 1 << 24  # logits of one forward pass
CHUNK_ELEMENTS = 1 << 22  # logits that the metrics look at together
CONFIDENT = 0.5  # the baseline is confident where its likeliest token has more than this probability


class Kept(Protocol):
    """Where the scores of finished batches are kept, so that a killed run goes on where it was."""

    def get(self, index: int, tokens: int) -> tuple[TokenScores, float] | None:
        """The scores of a batch of so many scored tokens, and the candidate's seconds; None if it is not finished."""

    def put(self, index: int, scores: TokenScores, seconds: float) -> None:
        """Keeps the scores of a finished batch."""


def score(
    candidate: Runtime,
    baseline: Runtime | None,
    windows: Windows,
    progress: Progress | None = None,
    *,
    batch_tokens: int | None = None,
    kept: Kept | None = None,
    what: str = "scoring",
) -> Scores:
    """Scores every window, several per forward pass.

    batch_tokens: tokens per forward pass; chosen by the size of the logits where None. kept: batches found there are
    not computed again. what: the name of the stage in `progress`.

    Raises:
        IntegrityError: the two models' vocabularies differ in size.
        WorkError: logits that are not finite.
    """
    progress = progress or NullProgress()
    limit = BATCH_ELEMENTS // candidate.vocab_size if batch_tokens is None else batch_tokens
    order = torch.sort(windows.lengths, descending=True, stable=True).indices
    batches = order.split(max(1, limit // windows.seq_len))
    parts: list[TokenScores] = []
    seconds = 0.0
    progress.begin(what, len(batches))
    for index, chosen in enumerate(batches):
        found = None if kept is None else kept.get(index, int((windows.lengths[chosen] - 1).sum()))
        if found is None:
            found = _batch(candidate, baseline, windows, chosen)
            if kept is not None:
                kept.put(index, *found)
        parts.append(found[0])
        seconds += found[1]
        progress.advance()
    progress.end()
    return aggregate(concatenate(parts), windows, order, seconds)


def _batch(candidate: Runtime, baseline: Runtime | None, windows: Windows, chosen: Tensor) -> tuple[TokenScores, float]:
    lengths = windows.lengths[chosen]
    rows = windows.tokens[chosen][:, : int(lengths.max())]
    start = time.perf_counter()
    logits = _logits(candidate, rows)
    seconds = time.perf_counter() - start
    return token_scores(rows, logits, None if baseline is None else _logits(baseline, rows), lengths), seconds


def token_scores(rows: Tensor, logits: Tensor, reference: Tensor | None, lengths: Tensor | None = None) -> TokenScores:
    """Scores of one batch. rows (batch, seq) token ids; logits and the baseline's `reference` (batch, seq, vocab).

    lengths (batch,): tokens of each row that count, its first included; all where None. KL is KL(baseline || candidate)
    in nats.
    """
    if reference is not None and reference.shape != logits.shape:
        raise IntegrityError(
            f"the vocabularies differ: {logits.shape[-1]} entries against the baseline's {reference.shape[-1]}",
            "a compressed model can only be compared with the model it was made from",
        )
    targets = _counted(rows[:, 1:], lengths).to(logits.device)
    ours = _counted(logits[:, :-1], lengths)
    theirs = None if reference is None else _counted(reference[:, :-1], lengths)
    size = max(1, CHUNK_ELEMENTS // ours.shape[-1])
    return concatenate(
        [
            _chunk(targets[i : i + size], ours[i : i + size], None if theirs is None else theirs[i : i + size])
            for i in range(0, len(targets), size)
        ]
    )


def _counted(values: Tensor, lengths: Tensor | None) -> Tensor:
    """(batch, seq - 1, ...) -> (tokens, ...): the positions that predict a token, row by row."""
    if lengths is None or bool((lengths == values.shape[1] + 1).all()):
        return values.flatten(0, 1)
    inside = torch.arange(1, values.shape[1] + 1) < lengths.unsqueeze(1)
    return values[inside.to(values.device)]


def _chunk(targets: Tensor, logits: Tensor, reference: Tensor | None) -> TokenScores:
    ours = logits.float().log_softmax(-1)
    index = targets.unsqueeze(-1)
    correct = ours.gather(-1, index).squeeze(-1).double().cpu()
    if reference is None:
        return TokenScores(-correct)
    theirs = reference.float().log_softmax(-1)
    probabilities = theirs.exp()
    kl = (probabilities * (theirs - ours)).sum(-1)
    top = theirs.max(-1)
    correct_baseline = theirs.gather(-1, index).squeeze(-1).double().cpu()
    return TokenScores(
        -correct,
        nll_baseline=-correct_baseline,
        kl=kl.double().cpu(),
        dp=correct.exp() - correct_baseline.exp(),
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

"""Log-likelihoods of continuations through a transformers model: shared beginnings once, logits only where read.

Rows that share beginnings go through the model with an attention mask and positions of their own. Not every
architecture takes those (recurrent layers, ALiBi), so each model is first tried on a small example and must give what
it gives without sharing; otherwise nothing is shared. Plain rows are padded on the right, which causal attention never
sees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compress.errors import WorkError
from compress.runtime.continuations import Batch, Continuation, Likelihood, Row, plan

BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
LOGIT_ELEMENTS = 1 << 26
_CHUNK_ELEMENTS = 1 << 20
_DEFAULT_HIDDEN = 1024
_WINDOWS = ("sliding_window", "attention_chunk_size")


class ContinuationScorer:
    """Plans and scores continuations on one model."""

    def __init__(self, model: Any, device: str, vocab_size: int, origin: str) -> None:
        """model: a causal language model of transformers in eval mode. origin: its name in errors."""
        self._model = model
        self._device = torch.device(device)
        self._vocab_size = vocab_size
        self._origin = origin
        self._config = model.config.get_text_config()

    def plan(self, requests: Sequence[Continuation]) -> list[Batch]:
        """The batches of the requests; the same for the same requests."""
        return self._plan(requests, self._tree_depth)

    def _plan(self, requests: Sequence[Continuation], tree_depth: int | None) -> list[Batch]:
        return plan(
            requests,
            batch_tokens=BATCH_TOKENS.get(self._device.type, BATCH_TOKENS["cpu"]),
            scored_tokens=max(1, LOGIT_ELEMENTS // self._vocab_size),
            hidden=getattr(self._config, "hidden_size", None) or _DEFAULT_HIDDEN,
            tree_depth=tree_depth,
        )

    @torch.inference_mode()
    def score(self, batch: Batch) -> list[Likelihood]:
        """One result per request of the batch, in the order of `batch.requests`.

        Raises:
            WorkError: a log-likelihood that is not finite.
        """
        width = max(len(row.tokens) for row in batch.rows)
        reads = [
            (number * width + read.node, read.target, read.request)
            for number, row in enumerate(batch.rows)
            for read in row.reads
        ]
        nodes, targets, owners = (torch.tensor(column) for column in zip(*reads, strict=True))
        needed, at = nodes.unique(return_inverse=True)
        logits = self._logits(batch, width, needed)
        values, greedy = target_scores(logits, at.to(self._device), targets.to(self._device))
        if not bool(torch.isfinite(values).all()):
            raise WorkError(
                f"{self._origin} gives log-likelihoods that are not finite",
                "its weights hold NaN or overflow in this dtype: try --dtype float32, or make the model again",
            )
        place = {request: number for number, request in enumerate(batch.requests)}
        slots = torch.tensor([place[owner] for owner in owners.tolist()])
        totals = torch.zeros(len(place), dtype=torch.float64).index_add_(0, slots, values)
        misses = torch.zeros(len(place), dtype=torch.int64).index_add_(0, slots, (~greedy).long())
        return [Likelihood(t, m == 0) for t, m in zip(totals.tolist(), misses.tolist(), strict=True)]

    def _logits(self, batch: Batch, width: int, needed: Tensor) -> Tensor:
        """Logits (needed, vocab) at the given places of the flattened (rows, width) batch."""
        ids = torch.zeros(len(batch.rows), width, dtype=torch.int64)
        for number, row in enumerate(batch.rows):
            ids[number, : len(row.tokens)] = torch.tensor(row.tokens)
        extra = _tree_inputs(batch.rows, width, self._model.dtype, self._device) if batch.branches else {}
        needed = needed.to(self._device)
        head = self._model.get_output_embeddings()
        if head is None:
            logits: Tensor = self._model(input_ids=ids.to(self._device), use_cache=False, **extra).logits
            return logits.flatten(0, 1)[needed]

        def select(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (inputs[0].flatten(0, 1)[needed].unsqueeze(0), *inputs[1:])

        hook = head.register_forward_pre_hook(select)
        try:
            output: Tensor = self._model(input_ids=ids.to(self._device), use_cache=False, **extra).logits
        finally:
            hook.remove()
        return output[0]

    @cached_property
    def _tree_depth(self) -> int | None:
        """The longest sequence for which tree attention is exact; None where the model does not do it at all.

        A layer that sees only a window of its past would need a mask of its own: sequences within the window do not.
        """
        if not self._shares_exactly():
            return None
        windows = [getattr(self._config, name, None) for name in _WINDOWS]
        return min([window for window in windows if window], default=2**31)

    def _shares_exactly(self) -> bool:
        """Whether the model gives the same log-likelihoods with shared beginnings as without."""
        size = self._vocab_size
        beginning = [(7 * i + 3) % size for i in range(8)]
        probes = [Continuation((*beginning, *((11 * i + 5 * k + 1) % size for i in range(4 + k))), 6) for k in range(3)]
        try:  # any model's code may fail on a mask or positions that it was not written for, in any of these ways
            shared = self._all(probes, 2**31)
        except (TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError, IndexError):
            return False
        alone = self._all(probes, None)
        tolerance = 1e-4 if self._model.dtype == torch.float32 else 3e-2
        return all(math.isclose(a, b, rel_tol=tolerance) for a, b in zip(shared, alone, strict=True))

    def _all(self, requests: list[Continuation], tree_depth: int | None) -> list[float]:
        totals = [math.nan] * len(requests)
        for batch in self._plan(requests, tree_depth):
            for request, found in zip(batch.requests, self.score(batch), strict=True):
                totals[request] = found.total
        return totals


def _tree_inputs(rows: Sequence[Row], width: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """position_ids (rows, width) and the additive attention_mask (rows, 1, width, width) of prefix trees.

    Padding attends to itself alone, so that its softmax is defined.
    """
    positions = torch.zeros(len(rows), width, dtype=torch.int64)
    ends = torch.arange(1, width + 1).repeat(len(rows), 1)
    for number, row in enumerate(rows):
        positions[number, : len(row.tokens)] = torch.tensor(row.depths)
        ends[number, : len(row.tokens)] = torch.tensor(row.ends)
    node = torch.arange(width, device=device)
    sees = (node[None, :] <= node[:, None]) & (node[None, :, None] < ends.to(device)[:, None, :])
    mask = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, torch.finfo(dtype).min)
    return {"position_ids": positions.to(device), "attention_mask": mask.unsqueeze(1)}


def target_scores(logits: Tensor, at: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability (float64) of each target and whether it is the likeliest, on the CPU.

    logits (nodes, vocab); at and targets (reads,): target k is predicted by row at[k]. A few rows at a time, so that
    what is worked on stays in the cache.
    """
    step = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    order = at.argsort(stable=True)
    edges = torch.searchsorted(at[order], torch.arange(0, len(logits) + step, step, device=at.device)).tolist()
    values = torch.empty(len(at), dtype=torch.float64)
    greedy = torch.empty(len(at), dtype=torch.bool)
    for number, (low, high) in enumerate(pairwise(edges)):
        chosen = order[low:high]
        rows = logits[number * step : (number + 1) * step].float()
        if rows.is_cuda:  # where torch adds in an order that a row's alignment decides: all begin at 16 bytes
            rows = functional.pad(rows, (0, -rows.shape[-1] % 4), value=-torch.inf)
        log_probabilities = rows.log_softmax(-1)
        local = at[chosen] - number * step
        values[chosen.cpu()] = log_probabilities[local, targets[chosen]].double().cpu()
        greedy[chosen.cpu()] = (log_probabilities.argmax(-1)[local] == targets[chosen]).cpu()
    return values, greedy

"""What back ends over a paged key-value cache share: the engine, scores of sequences and of prefix trees, requests."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from compress.content import calibration_dir
from compress.errors import WorkError
from compress.models.checkpoint import Checkpoint
from compress.runtime.answer import Answer
from compress.runtime.cache_choice import TOKENS, CacheChoice, choose
from compress.runtime.continuations import Batch, Continuation, Likelihood, plan
from compress.runtime.engine import Engine
from compress.runtime.kv_cache import Scales, stored_scales
from compress.runtime.memory import guarded
from compress.runtime.paged_model import Chunk, PagedModel
from compress.runtime.paged_trees import together, tree_logits
from compress.runtime.sampling import not_finite
from compress.runtime.scheduler import Request
from compress.runtime.text_model import TextModel
from compress.runtime.transformers_scoring import BATCH_TOKENS, target_scores

_ANY_DEPTH = 2**31


class PagedRuntime(TextModel):
    """A model over pages behind the `Runtime` protocol; a back end adds what computes its steps."""

    batched_generate = True
    device: str
    model: PagedModel
    cache: CacheChoice

    def __init__(self, checkpoint: Checkpoint, model: PagedModel, *, prefix_cache: bool) -> None:
        """prefix_cache: calls of `generate` share with earlier ones."""
        super().__init__(checkpoint)
        self.model = model
        self.engine = Engine(model.step, model.pages, step_tokens=model.step_tokens)
        self._prefix_cache = prefix_cache
        self.context_length = model.shape.config.max_position_embeddings
        self.vocab_size = model.shape.vocabulary

    def _choose_cache(self, kind: str, skip: str) -> CacheChoice:
        """What every layer keeps, set in the model; kind, skip: as in `loading.load`."""
        stored = stored_scales(self.checkpoint)
        layers = self.model.shape.layers
        scales = [(float(key), float(value)) for key, value in _by_layer(stored, layers)] if stored else None
        if kind == "auto":
            kind = "fp8" if scales else self.model.caches[0]
        with guarded("measuring the key-value cache"):
            return choose(self.model, kind, skip, scales, self._sample)

    def _sample(self) -> list[int]:
        """Tokens to measure inputs and caches on, without those that only the tokenizer has."""
        text = (calibration_dir() / "tales.txt").read_text(encoding="utf-8")[: 16 * TOKENS]
        begin = [] if self.prefix_id is None else [self.prefix_id]
        known = [token for token in begin + self.encode(text) if token < self.vocab_size]
        return known[: min(TOKENS, self.context_length or TOKENS)]

    def parameters(self) -> int:
        """Number of weights, tied ones once."""
        shape = self.model.shape
        biases = [name for name in self.checkpoint.index if name.endswith(".bias")]
        return (
            shape.vocabulary * shape.hidden
            + sum(math.prod(size) for size in shape.linears().values())
            + sum(shape.norms().values())
            + sum(self.checkpoint.index[name].shape[0] for name in biases)
        )

    def score(self, token_ids: Tensor) -> Tensor:
        """Logits (batch, seq, vocab) float32 for token ids (batch, seq) int64, no padding."""
        self._check(token_ids)
        with guarded("scoring"), self._scoring():
            logits = torch.empty(*token_ids.shape, self.vocab_size, device=self.device)
            pool, length = self.model.pages, token_ids.shape[1]
            room = pool.free // pool.pages_for(length)
            together = max(1, min(self.model.step_tokens // length, room))
            for rows, out in zip(token_ids.split(together), logits.split(together), strict=True):
                self._score_rows(rows.tolist(), out)
            return logits

    def _score_rows(self, rows: Sequence[Sequence[int]], out: Tensor) -> None:
        """Logits of several rows of one length in one step, or of a single one in as many as it takes."""
        length, pool = len(rows[0]), self.model.pages
        each = pool.pages_for(length)
        with pool.lend(len(rows) * each * pool.tokens) as pages:
            if len(rows) == 1:
                self.model.sequence(rows[0], 0, pages, range(length), out=out[0])
                return
            long = self.model.long(length)
            own = [pages[i * each : (i + 1) * each] for i in range(len(rows))]
            chunks = [Chunk(row, 0, mine, range(length), long) for row, mine in zip(rows, own, strict=True)]
            out.copy_(self.model.step(chunks).view_as(out))

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        """How scores are computed, where not as answers are."""
        yield

    def plan_continuations(self, requests: Sequence[Continuation]) -> list[Batch]:
        """Batches that hold each request once, rows by what they share."""
        self._check_continuations(requests)
        tokens = BATCH_TOKENS[torch.device(self.device).type]
        return plan(
            requests,
            batch_tokens=tokens,
            scored_tokens=tokens,
            hidden=self.model.shape.hidden,
            tree_depth=_ANY_DEPTH,
            apart=self.model.first_context,
        )

    def score_continuations(self, batch: Batch) -> list[Likelihood]:
        """Log-likelihood of each request of a batch, in the order of `batch.requests`."""
        totals = dict.fromkeys(batch.requests, 0.0)
        greedy = dict.fromkeys(batch.requests, True)
        with guarded("scoring"), self._scoring():
            for rows in together(self.model, batch.rows):
                nodes = [sorted({read.node for read in row.reads}) for row in rows]
                for row, own, logits in zip(rows, nodes, tree_logits(self.model, rows, nodes), strict=True):
                    place = {node: at for at, node in enumerate(own)}
                    at = torch.tensor([place[read.node] for read in row.reads], device=logits.device)
                    targets = torch.tensor([read.target for read in row.reads], device=logits.device)
                    values, best = target_scores(logits, at, targets)
                    for read, value, first in zip(row.reads, values.tolist(), best.tolist(), strict=True):
                        totals[read.request] += value
                        greedy[read.request] &= first
        if not all(map(math.isfinite, totals.values())):
            raise WorkError(
                f"{self.path} gives log-likelihoods that are not finite",
                "its weights hold NaN or overflow: make the model again",
            )
        return [Likelihood(totals[request], greedy[request]) for request in batch.requests]

    def _finished(self, answers: Sequence[Answer]) -> Sequence[Answer]:
        """All answers together, step by step."""
        with self._requests(answers) as requests:
            while any(answer.reason is None for answer in answers):
                self._step(requests, answers)
        return answers

    def _grow(self, answer: Answer) -> Generator[None, None, None]:
        """One answer, beside whatever else the engine is asked for meanwhile."""
        with self._requests([answer]) as requests:
            while answer.reason is None:
                self._step(requests, [answer])
                yield

    def _step(self, requests: Sequence[Request], answers: Sequence[Answer]) -> None:
        """One step of the engine; WorkError where one of these requests has failed, in this step or another's."""
        self.engine.step()
        if any(request.finished and answer.reason is None for request, answer in zip(requests, answers, strict=True)):
            raise not_finite()

    @contextmanager
    def _requests(self, answers: Sequence[Answer]) -> Iterator[Sequence[Request]]:
        """The engine's requests for some answers; those not finished at the end are cancelled."""
        requests: list[Request] = []
        leader: Request | None = None
        try:
            for i, answer in enumerate(answers):
                if i == 0 or answer.prompt is not answers[i - 1].prompt:  # answers to one prompt are side by side
                    leader = None
                long = self.model.long(len(answer.prompt) + answer.limit)
                requests.append(self.engine.add(answer, priority=answer.params.priority, leader=leader, long=long))
                leader = leader or requests[-1]
            yield requests
        finally:
            for request in requests:
                self.engine.cancel(request)
            if not self._prefix_cache:
                self.model.pages.forget()


def _by_layer(stored: Mapping[str, Scales], layers: int) -> list[Scales]:
    return [stored[f"model.layers.{i}.self_attn"] for i in range(layers)]

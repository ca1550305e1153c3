"""The native back end: decoders from packed weights, a decode step being one native call."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from compress.content import calibration_dir
from compress.errors import WorkError
from compress.kernels.dispatch import native
from compress.models.checkpoint import Checkpoint
from compress.runtime.answer import Answer
from compress.runtime.cache_choice import TOKENS, choose
from compress.runtime.continuations import Batch, Continuation, Likelihood, Row, plan
from compress.runtime.engine import Engine
from compress.runtime.input_choice import MOST_LOST, rounding_loss
from compress.runtime.kv_cache import Scales, stored_scales
from compress.runtime.memory import guarded
from compress.runtime.native_model import NativeModel
from compress.runtime.native_sequence import NativeSequence
from compress.runtime.native_shape import Shape
from compress.runtime.protocol import LayerUse
from compress.runtime.scheduler import Request
from compress.runtime.text_model import TextModel
from compress.runtime.transformers_scoring import BATCH_TOKENS, target_scores

_ANY_DEPTH = 2**31


class NativeRuntime(TextModel):
    """A model of a supported architecture behind the `Runtime` protocol; make one with `loading.load`."""

    name = "native"
    device = "cpu"
    dtype = "float32"
    batched_generate = True
    deterministic = True

    def __init__(
        self,
        checkpoint: Checkpoint,
        shape: Shape,
        eight_bit: bool | None,
        *,
        prefix_cache: bool = False,
        cache_tokens: int | None = None,
        kv_cache: str = "auto",
        kv_skip: str = "none",
    ) -> None:
        """eight_bit, cache_tokens: as in `NativeModel`; eight_bit None: of answers the inputs alone, where that costs
        little, as measured (`rounding_loss`), and of scores nothing. kv_cache, kv_skip: as in `loading.load`.

        prefix_cache: calls of `generate` share with earlier ones.
        """
        super().__init__(checkpoint)
        with guarded("loading the model"):
            self.model = NativeModel(checkpoint, shape, bool(eight_bit), cache_tokens)
        self.engine = Engine(self.model.step, self.model.pages)
        self._prefix_cache = prefix_cache
        self.context_length = shape.config.max_position_embeddings
        self.vocab_size = shape.vocabulary
        self.rounding_loss: float | None = None
        self._scores_exactly = eight_bit is None
        if eight_bit is None:
            with guarded("measuring inputs in 8 bits"):
                self.rounding_loss = rounding_loss(self.model, self._sample)
            self.model.eight_bit = self.rounding_loss is not None and self.rounding_loss <= MOST_LOST
        self.kernel = f"cpu-{native().isa()}" + ("-int8" if self.model.eight_bit else "")
        stored = stored_scales(checkpoint)
        scales = [(float(key), float(value)) for key, value in _by_layer(stored, shape.layers)] if stored else None
        if kv_cache == "auto":
            kv_cache = "fp8" if scales else "float32"
        with guarded("measuring the key-value cache"):
            self.cache = choose(self.model, kv_cache, kv_skip, scales, self._sample)

    def _sample(self) -> list[int]:
        """Tokens to measure inputs and caches on."""
        text = (calibration_dir() / "tales.txt").read_text(encoding="utf-8")[: 16 * TOKENS]
        begin = [] if self.prefix_id is None else [self.prefix_id]
        return (begin + self.encode(text))[: min(TOKENS, self.context_length or TOKENS)]

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

    def layers(self) -> list[LayerUse]:
        """Every linear with the kernel that multiplies it."""
        return self.model.layers(f"cpu-{native().isa()}")

    def score(self, token_ids: Tensor) -> Tensor:
        """Logits (batch, seq, vocab) float32 for token ids (batch, seq) int64, no padding."""
        self._check(token_ids)
        with guarded("scoring"), self._scoring():
            rows = []
            for sequence in token_ids.tolist():
                with self.model.pages.lend(len(sequence)) as pages:
                    rows.append(self.model.sequence(sequence, 0, pages, range(len(sequence))))
            return torch.stack(rows)

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        before = self.model.eight_bit
        self.model.eight_bit = before and not self._scores_exactly
        try:
            yield
        finally:
            self.model.eight_bit = before

    def plan_continuations(self, requests: Sequence[Continuation]) -> list[Batch]:
        """Batches that hold each request once, rows by what they share."""
        self._check_continuations(requests)
        return plan(
            requests,
            batch_tokens=BATCH_TOKENS["cpu"],
            scored_tokens=BATCH_TOKENS["cpu"],
            hidden=self.model.shape.hidden,
            tree_depth=_ANY_DEPTH,
            apart=self.model.first_context,
        )

    def score_continuations(self, batch: Batch) -> list[Likelihood]:
        """Log-likelihood of each request of a batch, in the order of `batch.requests`."""
        totals = dict.fromkeys(batch.requests, 0.0)
        greedy = dict.fromkeys(batch.requests, True)
        with guarded("scoring"), self._scoring():
            for row in batch.rows:
                nodes = sorted({read.node for read in row.reads})
                place = {node: at for at, node in enumerate(nodes)}
                at = torch.tensor([place[read.node] for read in row.reads])
                targets = torch.tensor([read.target for read in row.reads])
                values, best = target_scores(self._tree(row, nodes), at, targets)
                for read, value, first in zip(row.reads, values.tolist(), best.tolist(), strict=True):
                    totals[read.request] += value
                    greedy[read.request] &= first
        if not all(map(math.isfinite, totals.values())):
            raise WorkError(
                f"{self.path} gives log-likelihoods that are not finite",
                "its weights hold NaN or overflow: make the model again",
            )
        return [Likelihood(totals[request], greedy[request]) for request in batch.requests]

    def _tree(self, row: Row, nodes: Sequence[int]) -> Tensor:
        """Logits (nodes, vocab) at the given nodes of a prefix tree.

        A node's keys and values lie at its depth. In depth-first order those at smaller depths are its ancestors', so
        a chain is computed like the end of a plain sequence and overwrites the branch before it.
        """
        found = []
        length = max(row.depths) + 1
        with self.model.pages.lend(length) as pages:
            sequence = NativeSequence(self.model, pages, length)
            for start, end in _chains(row.depths):
                sequence.rewind(row.depths[start])
                inside = [node - start for node in nodes if start <= node < end]
                found.append(sequence.extend(row.tokens[start:end], inside))
        return torch.cat(found)

    def _finished(self, answers: Sequence[Answer]) -> Sequence[Answer]:
        """All answers together, step by step."""
        with self._requests(answers):
            while any(answer.reason is None for answer in answers):
                self.engine.step()
        return answers

    def _grow(self, answer: Answer) -> Generator[None, None, None]:
        """One answer, beside whatever else the engine is asked for meanwhile."""
        with self._requests([answer]):
            while answer.reason is None:
                self.engine.step()
                yield

    @contextmanager
    def _requests(self, answers: Sequence[Answer]) -> Iterator[None]:
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
            yield
        finally:
            for request in requests:
                self.engine.cancel(request)
            if not self._prefix_cache:
                self.model.pages.forget()


def _by_layer(stored: Mapping[str, Scales], layers: int) -> list[Scales]:
    return [stored[f"model.layers.{i}.self_attn"] for i in range(layers)]


def _chains(depths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """[start, end) of each run of nodes that are each the child of the one before."""
    start = 0
    for node in range(1, len(depths) + 1):
        if node == len(depths) or depths[node] != depths[node - 1] + 1:
            yield start, node
            start = node

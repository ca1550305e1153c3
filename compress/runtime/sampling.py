"""Choosing the next token from logits: penalties, temperature, top-k, top-p, min-p, from a private random generator."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from compress.errors import WorkError
from compress.kernels import dispatch
from compress.runtime.protocol import SamplingParams, TokenLogprob


class Sampler:
    """Chooses the tokens of one answer. The global random state is neither read nor moved."""

    def __init__(self, params: SamplingParams, index: int, prompt: Sequence[int]) -> None:
        """index: the answer's number among those of a call, so that equal prompts get answers of their own."""
        self.params = params
        self.logprobs: list[TokenLogprob] = []
        self._generator = seeded(params, index)
        self._prompt = set(prompt) if params.repetition_penalty != 1.0 else set()
        self._seen: Counter[int] = Counter()
        penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty - 1.0)
        self._penalised = any(penalties)
        self.plain = params.temperature == 0.0 and not self._penalised and params.logprobs is None
        """Whether the likeliest token is all that is asked for."""

    def choose(self, logits: Tensor) -> int:
        """One token id from finite logits (vocab,); greedy takes the lowest id among equals.

        Tokens are drawn on the CPU, so that a seed means the same draw on every device.
        """
        judged = self._judged(logits)
        if self.params.temperature == 0.0:
            return self._taken(logits, int(judged.argmax()))
        return self._taken(logits, self._drawn(*kept(judged, self.params)))

    def draft(self, logits: Tensor) -> tuple[int, Tensor | None]:
        """A token that a draft with these logits (vocab,) proposes, and the probabilities (vocab,) float64 it was drawn
        from; None where it is the likeliest. Penalties are left to the target."""
        if self.params.temperature == 0.0:
            return int(logits.argmax()), None
        ids, probabilities = kept(logits, self.params)
        return self._drawn(ids, probabilities), _dense(ids, probabilities, logits.numel())

    def judge(self, logits: Tensor, proposed: int, drawn_from: Tensor | None) -> tuple[int, bool]:
        """The next token, given the target's logits (vocab,) and what a draft proposed; whether that is it.

        Greedy, it is what `choose` says. Drawn tokens have the distribution that `choose` draws from: the proposal x of
        probability q(x) stays with probability min(1, p(x) / q(x)), and what takes its place is drawn from what p has
        more than q. drawn_from: q (vocab,); None for a proposal that was not drawn.
        """
        judged = self._judged(logits)
        if self.params.temperature == 0.0:
            token = int(judged.argmax())
            return self._taken(logits, token), token == proposed
        p = distribution(judged, self.params)
        q = torch.zeros_like(p).index_fill_(0, torch.tensor(proposed), 1.0) if drawn_from is None else drawn_from
        chance = torch.rand((), generator=self._generator, dtype=torch.float64)
        if bool(chance * q[proposed] < p[proposed]):
            return self._taken(logits, proposed), True
        more = (p - q).clamp_(min=0.0)
        return self._taken(logits, self._drawn(torch.arange(more.numel()), more / more.sum())), False

    def _judged(self, logits: Tensor) -> Tensor:
        return self._with_penalties(logits.double().cpu()) if self._penalised else logits

    def _drawn(self, ids: Tensor, probabilities: Tensor) -> int:
        """One of the ids: the first up to which the probabilities reach a number drawn evenly from [0, 1)."""
        reached = probabilities.cumsum(0)
        even = torch.rand((), generator=self._generator, dtype=torch.float64)
        return int(ids[torch.searchsorted(reached[:-1], even * reached[-1], right=True)])

    def _taken(self, logits: Tensor, token: int) -> int:
        """Notes the token that was chosen."""
        if self._penalised:
            self._seen[token] += 1
        if self.params.logprobs is not None:
            self.logprobs.append(_log_probability(logits, token, self.params.logprobs))
        return token

    def _with_penalties(self, logits: Tensor) -> Tensor:
        """Float64 logits, changed in place, after the penalties of `SamplingParams`."""
        params = self.params
        if params.repetition_penalty != 1.0 and (ids := sorted(self._prompt | self._seen.keys())):
            at = torch.tensor(ids)
            found = logits[at]
            logits[at] = torch.where(found > 0, found / params.repetition_penalty, found * params.repetition_penalty)
        if self._seen and (params.presence_penalty or params.frequency_penalty):
            counts = torch.tensor(list(self._seen.values()), dtype=torch.float64)
            logits[torch.tensor(list(self._seen))] -= params.presence_penalty + params.frequency_penalty * counts
        return logits


def choose_all(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """The next token of each row of logits (rows, vocab).

    Raises:
        WorkError: the logits are not finite.
    """
    if not bool(torch.isfinite(logits).all()):
        raise not_finite()
    return choose_finite(logits, samplers)


def not_finite() -> WorkError:
    """What is said where a model gives NaN or infinity."""
    return WorkError(
        "the model's logits are not finite", "its weights are damaged, or overflow in half precision: make it again"
    )


def choose_finite(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """The next token of each row of logits (rows, vocab) that are known to be finite."""
    if all(sampler.plain for sampler in samplers):
        found: list[int] = logits.argmax(-1).tolist()
        return found
    return [sampler.choose(row) for sampler, row in zip(samplers, logits, strict=True)]


def seeded(params: SamplingParams, index: int) -> torch.Generator:
    """The generator of answer number `index`: seeds and numbers that follow each other give unrelated draws."""
    digest = hashlib.sha256(f"{params.seed} {index}".encode()).digest()
    generator = torch.Generator(device="cpu")
    generator.manual_seed(int.from_bytes(digest[:8], "little"))
    return generator


def kept(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """What a token is drawn from: ids (n,) ascending and probabilities (n,) float64 of what the filters leave.

    logits: (vocab,) of any float dtype, without NaN, at a temperature above 0.
    """
    ids, probabilities = dispatch.native().keep_tokens(
        logits.float().cpu().contiguous(), params.temperature, params.top_k, params.top_p, params.min_p
    )
    return ids, probabilities


def distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """The same over the whole vocabulary: probabilities (vocab,) float64, zeros where a filter took a token out."""
    return _dense(*kept(logits, params), logits.numel())


def _dense(ids: Tensor, probabilities: Tensor, vocab: int) -> Tensor:
    return torch.zeros(vocab, dtype=torch.float64).index_copy_(0, ids, probabilities)


def _log_probability(logits: Tensor, token: int, count: int) -> TokenLogprob:
    found = logits.double().cpu().log_softmax(0)
    values, indices = found.topk(min(count, found.numel()))
    return TokenLogprob(token, float(found[token]), tuple(zip(indices.tolist(), values.tolist(), strict=True)))

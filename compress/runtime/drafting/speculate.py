"""Answers with a draft: propose, compute all proposals in one step of the target, keep what it would have said, repeat.

Leviathan, Kalman and Matias, Fast Inference from Transformers via Speculative Decoding, 2023 (arXiv 2211.17192).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from compress.errors import UserError
from compress.runtime.answer import Answer
from compress.runtime.drafting.draft_model import Draft, Proposal
from compress.runtime.drafting.sequence import opened
from compress.runtime.memory import guarded
from compress.runtime.protocol import Generation, SamplingParams, Speculation
from compress.runtime.sampling import not_finite
from compress.runtime.text_model import TextModel

MOST_PROPOSED = 16


class Speculator:
    """A target with a draft. Each answer is decoded alone, in steps of up to `count` proposed tokens and one more."""

    def __init__(self, target: TextModel, draft: Draft, count: int = 4) -> None:
        """Raises UserError for a count that is out of range."""
        if not 1 <= count <= MOST_PROPOSED:
            raise UserError(f"{count} draft tokens; it must be 1 to {MOST_PROPOSED}", "4 is a usual number")
        self.target, self.draft, self.count = target, draft, count

    def generate(self, prompts: Sequence[str | Sequence[int]], params: SamplingParams) -> list[Generation]:
        """As `Runtime.generate`; each answer says what its draft was worth.

        Greedy answers are those of the target alone: bit for bit of the native engine, whose logits do not depend on
        what is computed beside them; in transformers up to ties that rounding decides. Sampled ones are other draws
        than without a draft, from the same distribution.
        """
        with guarded("generating"):
            return [self._answered(answer) for answer in self.target.answers(prompts, params)]

    def _answered(self, answer: Answer) -> Generation:
        ids, sampler = list(answer.prompt), answer.sampler
        room = len(ids) + answer.limit + 1
        steps = proposed = 0
        accepted_at = [0] * self.count
        with opened(self.target, room) as target, self.draft.begun(room) as draft:
            answer.start()
            rows = target.extend(ids)[-1:]
            proposal = Proposal((), None)
            while True:
                if not bool(torch.isfinite(rows).all()):
                    raise not_finite()
                for at in range(len(proposal.tokens) + 1):
                    kept = at < len(proposal.tokens)
                    if kept:
                        token, kept = sampler.judge(rows[at], proposal.tokens[at], proposal.probabilities(at))
                        accepted_at[at] += kept
                    else:
                        token = sampler.choose(rows[at])
                    answer.take(token)
                    ids.append(token)
                    if not kept or answer.reason is not None:
                        break
                if answer.reason is not None:
                    break
                target.rewind(len(ids) - 1)
                proposal = draft.propose(ids, min(self.count, answer.limit - len(answer.fresh) - 1), sampler)
                rows = target.extend([ids[-1], *proposal.tokens])
                steps, proposed = steps + 1, proposed + len(proposal.tokens)
        found = Speculation(steps, proposed, sum(accepted_at), tuple(accepted_at))
        return replace(answer.generation(), speculation=found)

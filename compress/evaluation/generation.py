"""Greedy answers to fixed prompts: where they leave the baseline's, and whether they degenerate.

One changed token changes all that follow, so greedy answers amplify small differences: the first differing token and
the share of identical answers show what a user of the model would see. A collapsed model is found without a baseline
too: it answers nothing, or repeats itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from compress.artifact.canonical import sha256_json
from compress.errors import UserError
from compress.evaluation.kept_answers import Answering
from compress.evaluation.record_parts import AnswerSample, GenerationRecord
from compress.progress import NullProgress, Progress
from compress.runtime.protocol import SamplingParams

NGRAM = 4
MIN_NGRAMS = 8
REPEATED = 0.5
SAMPLES = 8
"""Answers that a record keeps."""


def compare_generation(
    candidate: Answering,
    baseline: Answering | None,
    prompts: Sequence[str],
    max_tokens: int,
    progress: Progress | None = None,
) -> GenerationRecord:
    """Lets the models continue each prompt greedily by at most `max_tokens` tokens.

    Raises:
        UserError: no prompts, or one that fills the context.
        WorkError: logits that are not finite.
    """
    if not prompts:
        raise UserError("there are no prompts to generate from", "give at least one prompt")
    progress = progress or NullProgress()
    params = SamplingParams(max_tokens=max_tokens)
    progress.begin("generating", len(prompts) * (1 if baseline is None else 2))
    answers = candidate.answers(prompts, params, progress)
    references = [] if baseline is None else baseline.answers(prompts, params, progress)
    progress.end()
    degenerate = [int(is_degenerate(answer.token_ids)) for answer in answers]
    identical: list[int] | None = None
    first: list[int] | None = None
    if baseline is not None:
        pairs = [(a.token_ids, b.token_ids) for a, b in zip(answers, references, strict=True)]
        identical = [int(ours == theirs) for ours, theirs in pairs]
        first = [max_tokens if ours == theirs else first_difference(ours, theirs) for ours, theirs in pairs]
    count = len(prompts)
    return GenerationRecord(
        prompts=count,
        max_tokens=max_tokens,
        prompts_sha256=sha256_json(list(prompts)),
        identical=None if identical is None else sum(identical) / count,
        first_difference_mean=None if first is None else sum(first) / count,
        degenerate=sum(degenerate) / count,
        empty=sum(not answer.text.strip() for answer in answers) / count,
        identical_per_prompt=identical,
        first_difference=first,
        degenerate_per_prompt=degenerate,
        samples=[
            AnswerSample(prompt=prompt, answer=ours.text, baseline=theirs.text if theirs is not None else None)
            for prompt, ours, theirs in list(zip_longest(prompts, answers, references))[:SAMPLES]
        ],
    )


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Index of the first token that differs; the length of the shorter answer where it begins the longer one."""
    for index, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return index
    return min(len(ours), len(theirs))


def is_degenerate(tokens: Sequence[int]) -> bool:
    """Whether an answer repeats itself: more than half of its 4-grams occurred in it before.

    Answers of fewer than 8 4-grams are too short to tell.
    """
    return len(tokens) >= MIN_NGRAMS + NGRAM - 1 and repetition(tokens) > REPEATED


def repetition(tokens: Sequence[int], n: int = NGRAM) -> float:
    """Share of the answer's n-grams that occurred in it before: 0 where all differ, near 1 in a loop.

    The rep-n measure of Welleck et al., Neural Text Generation with Unlikelihood Training (2020), section 4.
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0

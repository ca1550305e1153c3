"""Drafts for speculative decoding: opening one for a target, and what it is worth on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from compress.errors import UserError
from compress.evaluation.suites import packaged_prompts
from compress.progress import NullProgress, Progress
from compress.runtime.drafting.draft_model import Draft, DraftModel
from compress.runtime.drafting.speculate import Speculator
from compress.runtime.loading import load
from compress.runtime.protocol import Generation, SamplingParams, Speculation
from compress.runtime.sound import check_artifact
from compress.runtime.text_model import TextModel

PROMPTS, NEW_TOKENS = 16, 48


@dataclass(frozen=True, slots=True)
class Worth:
    """A draft on held-out prompts, greedy, one answer at a time: what was accepted, and decoding with and without it.

    tokens_per_second, plain_tokens_per_second: behind the first token. `equal`: whether all answers were those of the
    target alone.
    """

    draft: str
    draft_tokens: int
    prompts: int
    new_tokens: int
    speculation: Speculation
    acceptance: float | None
    tokens_per_step: float | None
    tokens_per_second: float | None
    plain_tokens_per_second: float | None
    equal: bool


def open_draft(path: str | Path, target: TextModel, *, device: str = "auto", kernel: str = "auto") -> Draft:
    """The draft at `path`, a model directory or an artifact, for a loaded target.

    Raises:
        UserError, WorkError: as `loading.load` does. IntegrityError: damaged files, or another tokenizer.
    """
    check_artifact(path, scores=False)
    return DraftModel(cast(TextModel, load(path, device=device, kernel=kernel)), target)


def worth(
    target: TextModel,
    draft: Draft,
    count: int,
    *,
    prompts: Sequence[str] | None = None,
    new_tokens: int = NEW_TOKENS,
    progress: Progress | None = None,
) -> Worth:
    """Decodes prompts with and without a draft. prompts: beginnings of held-out sentences that ship, if None.

    Raises:
        UserError, WorkError: as `Speculator` and `generate` do; answers too short for a single step.
    """
    progress = progress or NullProgress()
    asked = packaged_prompts(PROMPTS) if prompts is None else prompts
    params = SamplingParams(max_tokens=new_tokens)
    speculator = Speculator(target, draft, count)
    drafted: list[Generation] = []
    plain: list[Generation] = []
    progress.begin(f"decoding with the draft {draft.name}, and without", len(asked))
    for prompt in asked:
        drafted += speculator.generate([prompt], params)
        plain += target.generate([prompt], params)
        progress.advance("")
    progress.end()
    found = Speculation.sum([each.speculation for each in drafted if each.speculation is not None])
    if found.steps == 0:
        raise UserError("every answer ended with its first token: no draft was asked", "give other prompts")
    return Worth(
        draft=draft.name,
        draft_tokens=count,
        prompts=len(asked),
        new_tokens=new_tokens,
        speculation=found,
        acceptance=found.acceptance,
        tokens_per_step=found.tokens_per_step,
        tokens_per_second=_speed(drafted),
        plain_tokens_per_second=_speed(plain),
        equal=[each.token_ids for each in drafted] == [each.token_ids for each in plain],
    )


def _speed(answers: Sequence[Generation]) -> float | None:
    seconds = sum(answer.decode_seconds for answer in answers)
    tokens = sum(max(len(answer.token_ids) - 1, 0) for answer in answers)
    return tokens / seconds if seconds > 0 and tokens else None

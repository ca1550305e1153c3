"""A model as a library object: text in, text or log-probabilities out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch

from compress.content import default_model
from compress.runtime.loading import load
from compress.runtime.prompts import Prompt, several
from compress.runtime.protocol import Generation, SamplingParams
from compress.runtime.sound import check_artifact
from compress.runtime.text_model import TextModel
from compress.runtime.transformers_scoring import target_scores


class LLM:
    """A model directory or an artifact, loaded; `runtime` is the back end that runs it."""

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        device: str = "auto",
        kernel: str = "auto",
        prefix_cache: bool = True,
        cache_tokens: int | None = None,
        kv_cache: str = "auto",
        kv_skip: str = "none",
        deterministic: bool = False,
    ) -> None:
        """model: the packaged model if None. The other settings as in `compress.runtime.loading.load`.

        Raises:
            UserError, WorkError: as that does.
            IntegrityError: damaged files; an artifact is hashed whole first.
        """
        found = default_model() if model is None else model
        check_artifact(found, scores=False)
        self.runtime = load(
            found,
            device=device,
            kernel=kernel,
            prefix_cache=prefix_cache,
            cache_tokens=cache_tokens,
            kv_cache=kv_cache,
            kv_skip=kv_skip,
            deterministic=deterministic,
        )

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Generation]:
        """`params.n` answers per prompt, in order; a single text or list of ids counts as one prompt.

        params: of all prompts, or one for each. The native engine computes them together, and what prompts begin with
        in common only once.
        """
        return cast(TextModel, self.runtime).generate(several(prompts), SamplingParams() if params is None else params)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """The text of one answer piece by piece, as soon as it cannot change any more."""
        return cast(TextModel, self.runtime).stream(prompt, SamplingParams() if params is None else params)

    def score(self, texts: Prompt | Sequence[Prompt]) -> list[list[float]]:
        """The log-probability in nats of each token of a text but its first, given all before it.

        A text is read with the begin token before it, where the tokenizer has one; token ids are taken as they are.
        """
        return [self._score(text) for text in several(texts)]

    def _score(self, text: Prompt) -> list[float]:
        ids = torch.tensor([cast(TextModel, self.runtime).prompt_ids(text)])
        logits = self.runtime.score(ids)[0, :-1]
        at = torch.arange(len(logits), device=logits.device)
        values, _ = target_scores(logits, at, ids[0, 1:].to(logits.device))
        return cast(list[float], values.tolist())

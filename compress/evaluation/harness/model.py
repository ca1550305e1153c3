"""A runtime as lm-eval's model under test. Imports lm-eval: import this module where tasks are run, not before.

Contexts and continuations are tokenised as lm-eval's own `hf` model does (together, with the special tokens that the
tokenizer adds by itself, truncated on the left), so that scores agree with it. What differs is how they are computed:
the runtime plans batches over all requests at once and computes shared beginnings once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from compress.errors import UserError
from compress.evaluation.harness.cache import ResponseCache
from compress.evaluation.together import in_groups
from compress.progress import NullProgress, Progress
from compress.runtime.continuations import Continuation, Likelihood
from compress.runtime.protocol import Runtime, SamplingParams

DEFAULT_LENGTH = 2048
DEFAULT_NEW_TOKENS = 256
_REMEMBERED = 4096

Pair = tuple[tuple[str, str], list[int], list[int]]


class RuntimeLM(TemplateLM):
    """lm-eval's view of a runtime. `token_counts`: tokens of each (context, continuation) scored so far."""

    def __init__(self, runtime: Runtime, cache: ResponseCache | None = None, progress: Progress | None = None) -> None:
        super().__init__()
        self.runtime = runtime
        self.max_length = runtime.context_length or DEFAULT_LENGTH
        self.token_counts: dict[tuple[str, str], int] = {}
        self._cache = cache
        self._progress = progress or NullProgress()
        self._encode = lru_cache(maxsize=_REMEMBERED)(self._tokens)

    @property
    def eot_token_id(self) -> int:
        """The token that stands for an empty context: BOS, or EOS where there is no BOS.

        Raises:
            UserError: the tokenizer has neither.
        """
        if self.runtime.prefix_id is None:
            raise UserError(
                f"{self.runtime.path} has neither a begin nor an end token, and a task scores texts without a context",
                "choose tasks with a prompt",
            )
        return self.runtime.prefix_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; with the tokenizer's own special tokens unless told otherwise or there already."""
        return list(self._encode(string, add_special_tokens is not False))

    def _tokens(self, string: str, special: bool) -> tuple[int, ...]:
        if not special:
            return tuple(self.runtime.encode(string))
        ids = self.runtime.encode_prompt(string)
        doubled = len(ids) > 1 and ids[0] == ids[1] == self.runtime.prefix_id
        return tuple(self.runtime.encode(string) if doubled else ids)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each continuation, in order."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Pair], **_: Any) -> list[tuple[float, bool]]:
        for texts, _context, continuation in requests:
            self.token_counts[texts] = len(continuation)
        asked = [self._continuation(context, continuation) for _, context, continuation in requests]
        return [(found.total, found.greedy) for found in self._scored(asked)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood in nats of each whole text, each token once, in windows of the context's length."""
        windows: list[Continuation] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            for pair in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append(self._continuation(*make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, found in zip(owners, self._scored(windows), strict=True):
            totals[owner] += found.total
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The text that the model continues each context with, up to a stop string or the wanted length."""
        answers: list[str | None] = []
        keys: list[dict[str, Any]] = []
        for number, request in enumerate(requests):
            keys.append(self._generation_key(request.args[0], request.args[1], number))
            answers.append(None if self._cache is None else self._cache.get(keys[-1]))
        missing = [number for number, answer in enumerate(answers) if answer is None]
        self._progress.begin("generating answers", len(missing))
        for numbers in self._together(missing, keys):
            settings = keys[numbers[0]]["params"]
            params = SamplingParams(**{**settings, "stop": tuple(settings["stop"])})
            given = self.runtime.generate([keys[number]["tokens"] for number in numbers], params)
            for number, answer in zip(numbers, given, strict=True):
                text = self.runtime.decode(answer.token_ids)
                answers[number] = postprocess_generated_text(text, list(params.stop), None)
                if self._cache is not None:
                    self._cache.put(keys[number], answers[number])
                self._progress.advance()
        self._progress.end()
        return [str(answer) for answer in answers]

    def _together(self, numbers: list[int], keys: list[dict[str, Any]]) -> Iterator[Sequence[int]]:
        """The requests in groups to be answered in one call, of equal parameters: drawn answers have seeds of their
        own."""
        for _, alike in groupby(numbers, key=lambda number: keys[number]["params"]):
            yield from in_groups(list(alike), self.runtime)

    def _generation_key(self, context: str, settings: dict[str, Any], number: int) -> dict[str, Any]:
        """What is asked for, as plain data: the context's tokens, cut on the left to leave room, and the parameters."""
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(settings, DEFAULT_NEW_TOKENS))
        new = int(wanted["max_gen_toks"])
        if new >= self.max_length:
            raise UserError(
                f"a task asks for {new} new tokens and the model's context is {self.max_length}",
                "choose a model with a longer context, or a task with shorter answers",
            )
        tokens = self.tok_encode(context)[-(self.max_length - new) :] or [self.prefix_token_id]
        temperature = float(wanted.get("temperature") or 0.0) if wanted.get("do_sample") else 0.0
        params = {
            "max_tokens": new,
            "temperature": temperature,
            "top_k": int(wanted.get("top_k") or 0),
            "top_p": float(wanted.get("top_p") or 1.0),
            "seed": number if temperature else 0,
            "stop": [stop for stop in wanted["until"] if stop],
        }
        return {"tokens": tokens, "params": params}

    def _continuation(self, context: Sequence[int], continuation: Sequence[int]) -> Continuation:
        """The model sees at most `max_length` tokens, the last ones; the continuation must be among them."""
        if not continuation:
            raise UserError("a task has an empty answer to score", "give every choice and target some text")
        if len(continuation) > self.max_length:
            raise UserError(
                f"a task has an answer of {len(continuation)} tokens and the model's context is {self.max_length}",
                "choose a model with a longer context",
            )
        tokens = (*context, *continuation)[-(self.max_length + 1) :]
        return Continuation(tokens, len(tokens) - len(continuation))

    def _scored(self, asked: list[Continuation]) -> list[Likelihood]:
        """The likelihoods of the requests, in order; a batch is computed where the cache does not hold it whole."""
        found: list[Likelihood | None] = [None] * len(asked)
        pending = []
        for batch in self.runtime.plan_continuations(asked):
            key = [[asked[number].start, *asked[number].token_ids] for number in batch.requests]
            kept = None if self._cache is None else self._cache.get(key)
            if kept is None:
                pending.append((batch, key))
            else:
                for number, (total, greedy) in zip(batch.requests, kept, strict=True):
                    found[number] = Likelihood(total, greedy)
        self._progress.begin("scoring answers", len(pending))
        for batch, key in pending:
            scores = self.runtime.score_continuations(batch)
            for number, score in zip(batch.requests, scores, strict=True):
                found[number] = score
            if self._cache is not None:
                self._cache.put(key, [[score.total, score.greedy] for score in scores])
            self._progress.advance()
        self._progress.end()
        return [score for score in found if score is not None]

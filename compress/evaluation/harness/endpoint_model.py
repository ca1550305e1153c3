"""A served model as lm-eval's model under test. Imports lm-eval: import this module where tasks are run, not before.

Texts are sent whole and tokenised by the server; the continuation's tokens are those that reach past the context's
end. Several requests are under way at once, so that the server can batch them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from compress.errors import UserError
from compress.evaluation.harness.cache import ResponseCache
from compress.evaluation.harness.endpoint import Endpoint
from compress.progress import NullProgress, Progress

UNDER_WAY = 8
DEFAULT_NEW_TOKENS = 256


class EndpointLM(LM):
    """lm-eval's view of an endpoint. `token_counts`: the server's tokens of each (context, continuation) scored."""

    def __init__(
        self, endpoint: Endpoint, cache: ResponseCache | None = None, progress: Progress | None = None
    ) -> None:
        super().__init__()
        self.endpoint = endpoint
        self.token_counts: dict[tuple[str, str], int] = {}
        self._cache = cache
        self._progress = progress or NullProgress()

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each continuation, in order."""
        pairs = [(str(request.args[0]), str(request.args[1])) for request in requests]
        found = self._answers("scoring answers", pairs, lambda pair: self._score(*pair))
        for pair, (_, _, count) in zip(pairs, found, strict=True):
            self.token_counts[pair] = count
        return [(total, greedy) for total, greedy, _ in found]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Refused: windows of a text need its tokens, which a server keeps to itself."""
        raise UserError(f"{self.endpoint.path} cannot score a text's perplexity", "give a model directory for texts")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The text that the model continues each context with, up to a stop string or the wanted length."""
        asked = []
        for request in requests:
            wanted: dict[str, Any] = dict(normalize_gen_kwargs(request.args[1], DEFAULT_NEW_TOKENS))
            temperature = float(wanted.get("temperature") or 0.0) if wanted.get("do_sample") else 0.0
            stops = [stop for stop in wanted["until"] if stop]
            top_p = float(wanted.get("top_p") or 1.0)
            asked.append((str(request.args[0]), int(wanted["max_gen_toks"]), temperature, top_p, stops))
        return [str(answer) for answer in self._answers("generating answers", asked, self._generate)]

    def _generate(self, asked: tuple[str, int, float, float, list[str]]) -> str:
        prompt, new, temperature, top_p, stop = asked
        text = self.endpoint.complete(prompt, max_tokens=new, temperature=temperature, top_p=top_p, stop=stop)
        return postprocess_generated_text(text, stop, None)

    def _score(self, context: str, continuation: str) -> tuple[float, bool, int]:
        """As lm-eval's own models, spaces at the context's end count as the continuation's beginning."""
        echo = self.endpoint.echo(context + continuation)
        boundary = len(context.rstrip())
        ends = (*echo.offsets[1:], len(context) + len(continuation))
        own = [i for i, end in enumerate(ends) if end > boundary]
        logprobs = [echo.logprobs[i] for i in own]
        known = [value for value in logprobs if value is not None]
        if not own or len(known) < len(own):
            raise UserError(
                f"{self.endpoint.path} gives no log-probability of a text's first token: its tokenizer adds no begin "
                "token, and a task scores texts without a context",
                "choose tasks with a prompt",
            )
        return sum(known), all(echo.greedy[i] for i in own), len(own)

    def _answers(self, what: str, asked: Sequence[Any], answer: Callable[[Any], Any]) -> list[Any]:
        """The answers in order; those that the cache holds are not asked for again."""
        found = [None if self._cache is None else self._cache.get([what, request]) for request in asked]
        missing = [number for number, value in enumerate(found) if value is None]
        self._progress.begin(what, len(missing))
        with ThreadPoolExecutor(UNDER_WAY) as pool:
            try:
                for number, value in zip(missing, _in_turn(pool, answer, [asked[n] for n in missing]), strict=True):
                    found[number] = value
                    if self._cache is not None:
                        self._cache.put([what, asked[number]], value)
                    self._progress.advance()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        self._progress.end()
        return found


def _in_turn(pool: ThreadPoolExecutor, answer: Callable[[Any], Any], asked: Sequence[Any]) -> Iterator[Any]:
    """The answers in order, with no more than `UNDER_WAY` requests ahead of the one that is waited for."""
    waiting = [pool.submit(answer, request) for request in asked[:UNDER_WAY]]
    for number in range(len(asked)):
        if number + UNDER_WAY < len(asked):
            waiting.append(pool.submit(answer, asked[number + UNDER_WAY]))
        yield waiting[number].result()

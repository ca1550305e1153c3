"""A model behind an OpenAI-compatible server, given as `http(s)://host/v1` or `http(s)://host/v1#model`.

Everything goes through `POST /completions`: generated answers, and log-likelihoods as `echo` with `logprobs` where the
server gives those. What a server lacks is found out once, by asking, and named where a task needs it. A key, where one
is needed, comes from the environment variable COMPRESS_API_KEY.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compress.artifact.canonical import sha256_json
from compress.errors import UserError, WorkError

KEY_VARIABLE = "COMPRESS_API_KEY"
TIMEOUT_SECONDS = 300.0
TRIES = 5
FIRST_WAIT_SECONDS = 0.5
MAX_STOPS = 4  # of the API
_AGAIN = {408, 409, 429, 500, 502, 503, 504}
_PROBES = ("The capital of France is Paris, and", "Once upon a time there was a king who")


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt as the server reads it: where each token begins in the text, its log-probability (None for the first,
    which nothing stands before), and whether it was the likeliest."""

    offsets: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    greedy: tuple[bool, ...]


class Endpoint:
    """A served model. `missing`: what the server lacks for log-likelihoods, None where it lacks nothing.

    `digest` is over the address, the model's name and its answers to fixed questions, since its weights cannot be seen:
    a server that begins to serve something else becomes another model.
    """

    name = "endpoint"
    kernel = "remote"

    def __init__(self, url: str, model: str) -> None:
        """Asks the server what it can; use `open_endpoint`."""
        self.url = url
        self.model = model
        self.missing = self._find_missing()
        self.digest = sha256_json([url, model, [self._probe(text) for text in _PROBES]])

    @property
    def path(self) -> str:
        """The model's name in messages."""
        return f"{self.url}#{self.model}"

    def echo(self, prompt: str) -> Echo:
        """The prompt's tokens with their log-probabilities.

        Raises:
            UserError: the server does not give them.
            WorkError: the server fails, or answers with what is no completion.
        """
        if self.missing is not None:
            raise UserError(
                f"{self.path} gives no log-likelihoods: {self.missing}",
                "choose tasks that generate answers, or a server that echoes prompts with logprobs, such as vLLM",
            )
        try:
            return self._echo(prompt)
        except _Lacks as error:
            raise WorkError(f"{self.path} answers otherwise than before: {error}", "see what the server does") from None

    def complete(self, prompt: str, *, max_tokens: int, temperature: float, top_p: float, stop: Sequence[str]) -> str:
        """The text with which the model continues a prompt, stop strings left to the caller to cut.

        Raises:
            UserError: the server refuses the request.
            WorkError: the server fails, or answers with what is no completion.
        """
        request = {"prompt": prompt, "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
        return str(self._completion({**request, **({"stop": list(stop[:MAX_STOPS])} if stop else {})})["text"])

    def _echo(self, prompt: str) -> Echo:
        choice = self._completion({"prompt": prompt, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1})
        given = choice.get("logprobs") or {}
        tokens, logprobs, top = (given.get(key) for key in ("tokens", "token_logprobs", "top_logprobs"))
        if not str(choice["text"]).startswith(prompt):
            raise _Lacks("it does not echo the prompt (`echo`)")
        if not tokens or not logprobs:
            raise _Lacks("its echo has no `logprobs` with `tokens` and `token_logprobs`")
        if not top:
            raise _Lacks("its `logprobs` have no `top_logprobs`, so greedy answers cannot be told")
        offsets = given.get("text_offset") or _offsets(tokens, prompt)
        kept = [i for i, offset in enumerate(offsets) if offset < len(prompt)]
        return Echo(
            tuple(offsets[i] for i in kept),
            tuple(logprobs[i] for i in kept),
            tuple(bool(top[i]) and logprobs[i] is not None and logprobs[i] >= max(top[i].values()) for i in kept),
        )

    def _find_missing(self) -> str | None:
        try:
            found = self._echo(_PROBES[0])
        except (_Lacks, UserError) as error:
            return str(error) if isinstance(error, _Lacks) else f"it refuses `echo` with `logprobs` ({error.message})"
        if len(found.logprobs) < 2 or any(value is None for value in found.logprobs[1:]):
            return "its echo gives no log-probabilities of the prompt's own tokens"
        return None

    def _probe(self, text: str) -> list[Any]:
        answer = self.complete(text, max_tokens=16, temperature=0.0, top_p=1.0, stop=())
        return [answer, None if self.missing is not None else list(self._echo(text).logprobs)]

    def _completion(self, request: dict[str, Any]) -> dict[str, Any]:
        answer = _ask(f"{self.url}/completions", {"model": self.model, **request})
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0].get("text"), str):
            raise WorkError(f"{self.url}/completions gave no completion", "check that the server speaks OpenAI's API")
        return dict(choices[0])


class _Lacks(Exception):
    """What a server does not give."""


def is_endpoint(model: object) -> bool:
    """Whether what the user gave as MODEL is an address."""
    return isinstance(model, str) and model.startswith(("http://", "https://"))


def open_endpoint(address: str) -> Endpoint:
    """The model at an address; `#name` chooses one of several.

    Raises:
        UserError: an address that is none, no such model, or a server that refuses.
        WorkError: the server does not answer, or with what is no list of models.
    """
    base, _, wanted = address.partition("#")
    base = base.rstrip("/")
    if not urllib.parse.urlsplit(base).hostname:
        raise UserError(f"{address} is no address of a server", "give it as http://HOST/v1#NAME")
    listed = _ask(f"{base}/models", None).get("data")
    names = [str(entry["id"]) for entry in listed or [] if isinstance(entry, dict) and "id" in entry]
    if wanted and names and wanted not in names:
        raise UserError(f"{base} does not serve {wanted!r}", f"it serves {', '.join(names)}")
    if not wanted and len(names) != 1:
        served = ", ".join(names) or "a list of no models"
        raise UserError(f"{base} serves {served}; which one is meant?", f"name it: {base}#NAME")
    return Endpoint(base, wanted or names[0])


def _ask(url: str, body: dict[str, Any] | None) -> dict[str, Any]:
    """The server's JSON answer; asks again, later each time, where it is busy or does not answer."""
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if key := os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    reason = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
        try:
            request = urllib.request.Request(url, data, headers)
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
                value = json.loads(answer.read())
            if not isinstance(value, dict):
                raise ValueError("not an object")
            return value
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code}: {_shown(error.read())}"
            if error.code not in _AGAIN:
                raise UserError(f"{url} refuses the request: {reason}", _hint(error.code)) from error
        except ValueError as error:
            raise WorkError(f"{url} does not answer with JSON: {error}", "give the address that ends in /v1") from error
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
    raise WorkError(f"{url} did not answer ({TRIES} tries): {reason}", "check the address and that the server runs")


def _hint(code: int) -> str:
    if code in (401, 403):
        return f"give its key in the environment variable {KEY_VARIABLE}"
    return "give the address that ends in /v1" if code == 404 else "see what the server says"


def _shown(data: bytes) -> str:
    """What an error answer says, on one line."""
    text = data.decode("utf-8", "replace")
    try:
        error = json.loads(text)["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(text.split())[:200]


def _offsets(tokens: Sequence[str], prompt: str) -> list[int]:
    """Where each token begins, from the tokens' own texts."""
    offsets, length = [], 0
    for token in tokens:
        offsets.append(length)
        length += len(token)
    if not "".join(tokens).startswith(prompt):
        raise _Lacks("its `logprobs` have no `text_offset`, and its tokens do not spell the prompt")
    return offsets

"""What every back end can do: `score` (logits for given tokens) and `generate` (text for prompts).

Evaluation, the command line and the server see models only through `Runtime`, so a faster engine replaces a slower
one without any of them changing. Free of torch at import.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from compress.runtime import sampling_rules

if TYPE_CHECKING:
    import torch

    from compress.runtime.continuations import Batch, Continuation, Likelihood

FinishReason = Literal["stop", "length", "context"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How `generate` chooses tokens. Temperature 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 switch filters off.

    `min_p` keeps tokens of at least that share of the likeliest one's probability. `repetition_penalty` divides
    positive and multiplies negative logits of tokens in the prompt and the answer; `presence_penalty` is taken from the
    logits of tokens in the answer, `frequency_penalty` as often as they are there. `n` answers per prompt. `logprobs`
    asks for the log-probability of each new token and of so many of the likeliest, all before penalties, temperature
    and filters. `stop` ends an answer where its text holds one of these strings (or a single one given), which is left
    out of the text.
    `ignore_end` goes on past end tokens (for timing). Where not all answers have room at once, those of lower
    `priority` go first; it changes no answer, and back ends that answer one by one do without. The same seed, prompt
    and position in the list of prompts give the same text on the same machine.

    Raises:
        UserError: a value out of its range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    ignore_end: bool = False
    stop: tuple[str, ...] = ()
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    n: int = 1
    logprobs: int | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        given: Any = self.stop
        if isinstance(given, str | list):
            object.__setattr__(self, "stop", (given,) if isinstance(given, str) else tuple(given))
        sampling_rules.check(self)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability in nats of a new token, and (token, log-probability) of the likeliest ones, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Speculation:
    """What a draft was worth to an answer: `steps` of the target behind the one that read the prompt, tokens `proposed`
    to it and `accepted` by it, and how many of these at each place of a proposal."""

    steps: int
    proposed: int
    accepted: int
    accepted_at: tuple[int, ...]

    @property
    def acceptance(self) -> float | None:
        """The share of proposed tokens that were accepted; None where none was proposed."""
        return self.accepted / self.proposed if self.proposed else None

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens that a step of the target gave: accepted ones, and one of its own. None without a step."""
        return 1.0 + self.accepted / self.steps if self.steps else None

    @classmethod
    def sum(cls, parts: Sequence[Speculation]) -> Speculation:
        """Several answers together."""
        at = [sum(column) for column in zip(*(part.accepted_at for part in parts), strict=True)]
        return cls(
            sum(part.steps for part in parts),
            sum(part.proposed for part in parts),
            sum(part.accepted for part in parts),
            tuple(at),
        )


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer. `token_ids` are the new tokens (the end token, where one ended it, not among them).

    `finish_reason` is `stop` (an end token or a stop string came), `length` (`max_tokens`) or `context` (the model's
    context is full). `prefill_seconds` is the time to the first token, `decode_seconds` the time for all that follow
    it, `step_seconds` that of each step after the first token (the step that found an end token among them).
    `cached_tokens` of the prompt were not computed, because the key-value cache held them. `logprobs` has one entry per
    token where it was asked for. `speculation`: of an answer that was decoded with a draft.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    step_seconds: tuple[float, ...] = ()
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] | None = None
    speculation: Speculation | None = None

    @property
    def seconds(self) -> float:
        """Wall time of the whole answer."""
        return self.prefill_seconds + self.decode_seconds


@dataclass(frozen=True, slots=True)
class LayerUse:
    """What multiplies one linear, or the experts of one block together, and the bytes of weights that it takes.

    `aliases` are the other modules that share the weight (a tied head and its embedding). `weights` counts biases too.
    `held_bytes` lie in memory; `read_bytes` of them are read for one token alone: all but the experts not chosen.
    """

    name: str
    aliases: tuple[str, ...]
    kernel: str
    weights: int
    held_bytes: int
    read_bytes: int


class Runtime(Protocol):
    """A loaded model.

    `context_length` is the number of positions the model was trained for (None: it has no such limit), `prefix_id` the
    token put before every text (BOS, or EOS where the tokenizer has no BOS; None: neither), `dtype` the compute dtype,
    `kernel` what multiplies the linears, `batched_generate` whether `generate` decodes several prompts in one step,
    `deterministic` whether no bit of a result depends on what else is computed, in chunks or from a found prefix.
    """

    name: str
    kernel: str
    path: Path
    device: str
    dtype: str
    context_length: int | None
    vocab_size: int
    prefix_id: int | None
    batched_generate: bool
    deterministic: bool

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, no special tokens added."""

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text with the special tokens that the tokenizer itself adds to one (BOS, mostly, or none)."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""

    def tokenizer_digest(self) -> str:
        """SHA-256 of the vocabulary and the begin and end tokens: equal digests read text into the same ids."""

    def parameters(self) -> int:
        """Number of weights, tied ones once, counted as if the model were dense."""

    def layers(self) -> list[LayerUse]:
        """Every linear of the model as it is computed, in the model's order."""

    def score(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Logits (batch, seq, vocab) float32 for token ids (batch, seq) int64, no padding.

        Raises:
            UserError: a sequence longer than the context, or an id outside the vocabulary.
        """

    def plan_continuations(self, requests: Sequence[Continuation]) -> list[Batch]:
        """Batches for `score_continuations` that hold each request once; equal requests give equal batches.

        Raises:
            UserError: a sequence longer than the context, an id outside the vocabulary, or nothing to score.
        """

    def score_continuations(self, batch: Batch) -> list[Likelihood]:
        """Log-likelihood of each request of a batch, in the order of `batch.requests`.

        Raises:
            WorkError: a log-likelihood that is not finite, or out of memory.
        """

    def generate(self, prompts: Sequence[str | Sequence[int]], params: SamplingParams) -> list[Generation]:
        """One answer per prompt (`params.n` of them, one after the other), in order; each is independent of the others.

        A text is read as `prefix_id` and its tokens; token ids are taken as they are.

        Raises:
            UserError: a prompt that is empty or fills the context.
            WorkError: the model's logits are not finite.
        """

"""How fast a loaded model generates: greedy decoding of a fixed prompt, after a warm-up. Information, never gated."""

from __future__ import annotations

from dataclasses import dataclass

from compress.errors import UserError
from compress.runtime.protocol import Runtime, SamplingParams

PROMPT = "Once upon a time there was a king who had a daughter, and the daughter had a secret."
WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class GenerationSpeed:
    """Seconds to the first token, and tokens per second after it."""

    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    decode_tokens_per_second: float


def generation_speed(runtime: Runtime, *, prompt: str = PROMPT, max_tokens: int = 64) -> GenerationSpeed:
    """Measures one answer of `max_tokens` tokens (at least 2), end tokens ignored so that the length is what was asked.

    Raises:
        UserError: fewer than two tokens asked for, or no room for two in the model's context.
    """
    if max_tokens < 2:
        raise UserError(f"max_tokens is {max_tokens}; a decoding speed needs at least 2 tokens", "ask for 16 or more")
    runtime.generate([prompt], SamplingParams(max_tokens=WARM_UP_TOKENS, ignore_end=True))
    answer = runtime.generate([prompt], SamplingParams(max_tokens=max_tokens, ignore_end=True))[0]
    following = len(answer.token_ids) - 1
    if following < 1:
        raise UserError("the prompt leaves no room for two tokens in the model's context", "give a shorter prompt")
    return GenerationSpeed(
        answer.prompt_tokens, len(answer.token_ids), answer.prefill_seconds, following / answer.decode_seconds
    )

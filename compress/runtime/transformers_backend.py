"""The first back end: any causal language model that transformers knows, and every artifact, in dense arithmetic.

Packed weights are decoded once, at load, to the values that the packed checkpoint stands for. That is right for scoring
and slow for serving: memory and speed are those of the dense model, and `kernel` says so.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.models.checkpoint import Checkpoint
from compress.runtime.continuations import Batch, Continuation, Likelihood
from compress.runtime.layers import dense_layers
from compress.runtime.memory import guarded
from compress.runtime.protocol import FinishReason, Generation, LayerUse, SamplingParams
from compress.runtime.sampling import next_token, seeded
from compress.runtime.transformers_loader import end_tokens, load_model, load_tokenizer
from compress.runtime.transformers_scoring import ContinuationScorer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KERNELS = ("auto", "reference")
_TAIL_TOKENS = 8  # before a stop string, so that how decoding begins does not touch it


def load(path: str | Path, device: str = "auto", dtype: str = "auto", kernel: str = "auto") -> TransformersRuntime:
    """Loads a Hugging Face model directory or an artifact.

    device: `auto` (a CUDA device where there is one), `cpu`, `cuda` or `cuda:N`. dtype: what the arithmetic is done in;
    `auto` is float32 on the CPU and the checkpoint's own dtype on a GPU. kernel: `auto` or `reference`, torch's dense
    product; the packed kernels belong to the native engine.

    Raises:
        UserError: no model there, an unknown architecture, device, dtype or kernel.
        IntegrityError: damaged files, or tensors that do not fit the config.
        WorkError: out of memory.
    """
    if kernel not in _KERNELS:
        raise UserError(
            f"kernel {kernel!r} is not available in the transformers back end", f"choose {' or '.join(_KERNELS)}"
        )
    place = _device(device)
    checkpoint = Checkpoint.open(path)
    return TransformersRuntime(checkpoint, place, _dtype(dtype, place, checkpoint))


class TransformersRuntime:
    """A dense model behind the `Runtime` protocol; make one with `load`. `model` is the transformers module itself."""

    name = "transformers"
    kernel = "dense"
    batched_generate = False

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint = checkpoint
        self.path = checkpoint.path
        self.device = str(device)
        self.dtype = str(dtype).removeprefix("torch.")
        self.tokenizer: Any = load_tokenizer(checkpoint)
        with guarded(f"moving the model to {device}"):
            self.model: Any = load_model(checkpoint, dtype).to(device)
        text = self.model.config.get_text_config()
        self.context_length: int | None = getattr(text, "max_position_embeddings", None)
        self.vocab_size: int = text.vocab_size
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        self.prefix_id: int | None = eos if bos is None else bos
        self.end_ids = end_tokens(checkpoint, self.tokenizer)
        self._scorer = ContinuationScorer(self.model, self.device, self.vocab_size, str(self.path))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, no special tokens added."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text with the special tokens that the tokenizer itself adds to one."""
        return list(self.tokenizer(text, verbose=False)["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def tokenizer_digest(self) -> str:
        """SHA-256 of the vocabulary and the begin and end tokens.

        Taken over what the tokenizer does, not over its files, because tools that copy a model rewrite those files.
        """
        ends = [self.tokenizer.bos_token_id, self.tokenizer.eos_token_id]
        identity = [sorted(self.tokenizer.get_vocab().items()), *ends]
        return hashlib.sha256(json.dumps(identity, ensure_ascii=False).encode()).hexdigest()

    def parameters(self) -> int:
        """Number of weights, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def layers(self) -> list[LayerUse]:
        """Every linear, dense as it lies in memory."""
        return dense_layers(self.model, self.kernel)

    @torch.inference_mode()
    def score(self, token_ids: Tensor) -> Tensor:
        """Logits (batch, seq, vocab) float32 for token ids (batch, seq) int64, no padding."""
        self._check(token_ids)
        with guarded("scoring"):
            logits: Tensor = self.model(input_ids=token_ids.to(self.device), use_cache=False).logits
            return logits.float()

    def plan_continuations(self, requests: Sequence[Continuation]) -> list[Batch]:
        """Batches that hold each request once: by length, and by what they share where the model allows it."""
        for request in requests:
            if not 1 <= request.start < len(request.token_ids):
                raise UserError(
                    f"nothing to score: {len(request.token_ids)} tokens, from {request.start} on",
                    "give at least one token before `start` and one after it",
                )
        inputs = max((len(request.token_ids) - 1 for request in requests), default=1)
        ids = [token for request in requests for token in request.token_ids]
        self._check_range(inputs, min(ids, default=0), max(ids, default=0))
        with guarded("scoring"):
            return self._scorer.plan(requests)

    def score_continuations(self, batch: Batch) -> list[Likelihood]:
        """Log-likelihood of each request of a batch, in the order of `batch.requests`."""
        with guarded("scoring"):
            return self._scorer.score(batch)

    def generate(self, prompts: Sequence[str | Sequence[int]], params: SamplingParams) -> list[Generation]:
        """One answer per prompt, each computed alone, so that it does not depend on its neighbours."""
        with guarded("generating"):
            return [self._generate(prompt, params, index) for index, prompt in enumerate(prompts)]

    @torch.inference_mode()
    def _generate(self, prompt: str | Sequence[int], params: SamplingParams, index: int) -> Generation:
        if isinstance(prompt, str):
            ids = ([] if self.prefix_id is None else [self.prefix_id]) + self.encode(prompt)
        else:
            ids = list(prompt)
            self._check(torch.tensor([ids], dtype=torch.int64))
        room = params.max_tokens if self.context_length is None else self.context_length - len(ids)
        if not ids:
            raise UserError("the prompt is empty and the tokenizer has no begin token", "give a prompt")
        if room < 1:
            raise UserError(
                f"the prompt has {len(ids)} tokens and the model's context {self.context_length}", "shorten the prompt"
            )
        limit = min(params.max_tokens, room)
        generator = seeded(params, index)
        fresh: list[int] = []
        reason: FinishReason = "length" if limit == params.max_tokens else "context"
        cache: Any = None
        pending = ids
        stamps: list[float] = []
        start = time.perf_counter()
        while len(fresh) < limit:
            step = self.model(
                input_ids=torch.tensor([pending], device=self.device), past_key_values=cache, use_cache=True
            )
            token = next_token(step.logits[0, -1].float(), params, generator)
            stamps.append(time.perf_counter())
            if token in self.end_ids and not params.ignore_end:
                reason = "stop"
                break
            fresh.append(token)
            cache, pending = step.past_key_values, [token]
            if self._stopped(ids, fresh, params.stop):
                reason = "stop"
                break
        steps = tuple(after - before for before, after in pairwise(stamps))
        return Generation(
            text=_before(self._continuation(ids, fresh), params.stop),
            token_ids=tuple(fresh),
            finish_reason=reason,
            prompt_tokens=len(ids),
            prefill_seconds=stamps[0] - start,
            decode_seconds=stamps[-1] - stamps[0],
            step_seconds=steps,
        )

    def _continuation(self, prompt: list[int], fresh: list[int]) -> str:
        """The text that `fresh` adds: decoded together, because many tokenizers drop a leading space decoded alone."""
        before, whole = self.decode(prompt), self.decode(prompt + fresh)
        return whole[len(before) :] if whole.startswith(before) else self.decode(fresh)

    def _stopped(self, prompt: list[int], fresh: list[int], stops: Sequence[str]) -> bool:
        """Whether the answer holds a stop string; decodes all of it only where its last tokens seem to."""
        if not stops:
            return False
        tail = self.decode(fresh[-(max(len(stop.encode()) for stop in stops) + _TAIL_TOKENS) :])
        return any(stop in tail and stop in self._continuation(prompt, fresh) for stop in stops)

    def _check(self, token_ids: Tensor) -> None:
        if token_ids.ndim != 2 or token_ids.numel() == 0:
            raise UserError(f"token ids have shape {tuple(token_ids.shape)}", "give a non-empty (batch, seq) tensor")
        self._check_range(token_ids.shape[1], int(token_ids.min()), int(token_ids.max()))

    def _check_range(self, length: int, low: int, high: int) -> None:
        if self.context_length is not None and length > self.context_length:
            raise UserError(
                f"a sequence of {length} tokens exceeds the model's context of {self.context_length}",
                "use shorter windows (--seq-len)",
            )
        if low < 0 or high >= self.vocab_size:
            raise UserError(
                f"token id {low if low < 0 else high} is outside the vocabulary of {self.vocab_size}",
                "use the tokenizer that belongs to the model",
            )


def _before(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stop strings."""
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise UserError(f"unknown device {name!r}", "choose auto, cpu, cuda or cuda:N")
    if kind == "cuda" and (not available or int(number or 0) >= torch.cuda.device_count()):
        raise UserError(f"device {name!r} is not present on this machine", "choose --device cpu")
    return torch.device(name)


def _dtype(name: str, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise UserError(f"unknown dtype {name!r}", f"choose auto, {', '.join(DTYPES)}")
    own = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    return torch.float32 if device.type == "cpu" else DTYPES.get(str(own), torch.bfloat16)

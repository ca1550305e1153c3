"""The first back end: any causal language model that transformers knows, and every artifact, in dense arithmetic.

Packed weights are decoded once, at load, to the values that the packed checkpoint stands for: the reference that other
back ends are held to. Memory and speed are those of the dense model, and `kernel` says so.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.models.checkpoint import Checkpoint
from compress.runtime.answer import Answer
from compress.runtime.continuations import Batch, Continuation, Likelihood
from compress.runtime.layers import dense_layers
from compress.runtime.memory import guarded
from compress.runtime.protocol import LayerUse
from compress.runtime.sampling import choose_all
from compress.runtime.text_model import TextModel
from compress.runtime.transformers_loader import load_model
from compress.runtime.transformers_scoring import ContinuationScorer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KERNELS = ("auto", "reference")


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
    place = chosen_device(device)
    checkpoint = Checkpoint.open(path)
    return TransformersRuntime(checkpoint, place, chosen_dtype(dtype, place, checkpoint))


class TransformersRuntime(TextModel):
    """A dense model behind the `Runtime` protocol; make one with `load`. `model` is the transformers module itself."""

    name = "transformers"
    kernel = "dense"
    batched_generate = False
    deterministic = False

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(checkpoint)
        self.device = str(device)
        self.dtype = str(dtype).removeprefix("torch.")
        with guarded(f"moving the model to {device}"):
            self.model: Any = self._build(checkpoint, device, dtype)
        text = self.model.config.get_text_config()
        self.context_length = getattr(text, "max_position_embeddings", None)
        self.vocab_size = text.vocab_size
        self._scorer = ContinuationScorer(self.model, self.device, self.vocab_size, str(self.path))

    def _build(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Any:
        """The transformers module on its device."""
        return load_model(checkpoint, dtype).to(device)

    def parameters(self) -> int:
        """Number of weights, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def layers(self) -> list[LayerUse]:
        """Every linear, dense as it lies in memory."""
        return self.dense_layers()

    def dense_layers(self) -> list[LayerUse]:
        """Every module with a weight in memory."""
        return dense_layers(self.model, "dense")

    @torch.inference_mode()
    def score(self, token_ids: Tensor) -> Tensor:
        """Logits (batch, seq, vocab) float32 for token ids (batch, seq) int64, no padding."""
        self._check(token_ids)
        with guarded("scoring"):
            logits: Tensor = self.model(input_ids=token_ids.to(self.device), use_cache=False).logits
            return logits.float()

    def plan_continuations(self, requests: Sequence[Continuation]) -> list[Batch]:
        """Batches that hold each request once: by length, and by what they share where the model allows it."""
        self._check_continuations(requests)
        with guarded("scoring"):
            return self._scorer.plan(requests)

    def score_continuations(self, batch: Batch) -> list[Likelihood]:
        """Log-likelihood of each request of a batch, in the order of `batch.requests`."""
        with guarded("scoring"):
            return self._scorer.score(batch)

    def _grow(self, answer: Answer) -> Generator[None, None, None]:
        """Token after token of one answer, over keys and values that transformers keeps."""
        pending: Sequence[int] = answer.prompt
        cache: Any = None
        while answer.reason is None:
            with torch.inference_mode():
                ids = torch.tensor([pending], device=self.device)
                step = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache = step.past_key_values
                (token,) = choose_all(step.logits[:, -1].float(), [answer.sampler])
            answer.take(token)
            yield
            pending = [token]


def chosen_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` stands for; UserError for another or an absent one."""
    available = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise UserError(f"unknown device {name!r}", "choose auto, cpu, cuda or cuda:N")
    if kind == "cuda" and (not available or int(number or 0) >= torch.cuda.device_count()):
        raise UserError(f"device {name!r} is not present on this machine", "choose --device cpu")
    return torch.device(name)


def chosen_dtype(name: str, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    """What arithmetic is done in: `auto` is float32 on a CPU, else the checkpoint's own. UserError for another."""
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise UserError(f"unknown dtype {name!r}", f"choose auto, {', '.join(DTYPES)}")
    own = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    return torch.float32 if device.type == "cpu" else DTYPES.get(str(own), torch.bfloat16)

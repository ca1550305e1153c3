"""The evaluator of the benchmarks: KL, perplexity and top-1 agreement of candidates against one base model.

Deliberately independent of `compress.evaluation` (only transformers and compressed-tensors), so that the product is not
its own judge: both tools' artifacts are loaded the same way, weights dequantised in the checkpoint's dtype, arithmetic
in float32. Sums are kept per block of 2,048 tokens (4 windows of 512); comparisons are paired over those blocks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

BLOCK_TOKENS = 2048
Loader = Callable[[Path], Any]
"""Reads a model directory into a transformers model."""


@dataclass(frozen=True)
class BlockSums:
    """Per-block sums (blocks,) float64 over the scored positions of each block."""

    tokens: NDArray[np.float64]
    nll: NDArray[np.float64]
    kl: NDArray[np.float64]
    top1: NDArray[np.float64]

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.nll.sum() / self.tokens.sum()))

    @property
    def mean_kl(self) -> float:
        return float(self.kl.sum() / self.tokens.sum())

    @property
    def agreement(self) -> float:
        return float(self.top1.sum() / self.tokens.sum())

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({name: getattr(self, name).tolist() for name in self._columns()}))

    @classmethod
    def load(cls, path: Path) -> BlockSums:
        return cls(**{name: np.asarray(values) for name, values in json.loads(path.read_text()).items()})

    @staticmethod
    def _columns() -> tuple[str, ...]:
        return ("tokens", "nll", "kl", "top1")


def load_dense(model_dir: Path) -> Any:
    """A model with dense float32 weights: stored ones, or dequantised in the checkpoint's dtype and then widened."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    config = json.loads((model_dir / "config.json").read_text())
    if len(config.get("quantization_config", {}).get("config_groups", {})) > 1:
        # transformers decodes all weights by the first of several schemes, so our runtime decodes these.
        from compress.runtime import transformers_backend

        return transformers_backend.load(model_dir, "cpu", "float32").model
    options: dict[str, Any] = {"dtype": "auto"}
    if "quantization_config" in config:
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(model_dir, **options)
    return model.float().eval()


def load_rounding_inputs(model_dir: Path) -> Any:
    """The model of a scheme that rounds inputs, as transformers and compressed-tensors run it, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@torch.inference_mode()
def score(
    base_dir: Path, candidates: dict[str, Path], token_windows: NDArray[np.int64], load: Loader = load_dense
) -> dict[str, BlockSums]:
    """Score every candidate on the same windows (count, 1 + seq), each BOS and `seq` tokens that are all scored.

    The model reads the window without its last token. The result also holds the base itself under "base".

    The base's logits are computed once per block and shared by all candidates; windows that do not fill a block are
    dropped, so that all blocks weigh the same.
    """
    per_block = max(1, BLOCK_TOKENS // (token_windows.shape[1] - 1))
    blocks = len(token_windows) // per_block
    base = load_dense(base_dir)
    models = {name: load(path) for name, path in candidates.items()}
    sums: dict[str, dict[str, list[float]]] = {
        name: {key: [] for key in BlockSums._columns()} for name in ("base", *models)
    }
    for block in range(blocks):
        ids = torch.from_numpy(token_windows[block * per_block : (block + 1) * per_block])
        targets = ids[:, 1:].reshape(-1)
        reference = torch.log_softmax(base(ids[:, :-1]).logits.flatten(0, 1), dim=-1)
        for name in sums:
            logits = reference if name == "base" else models[name](ids[:, :-1]).logits.flatten(0, 1)
            logprobs = torch.log_softmax(logits, dim=-1)
            divergence = (reference.exp() * (reference - logprobs)).sum(-1).clamp_min(0)
            sums[name]["tokens"].append(float(targets.numel()))
            sums[name]["nll"].append(-logprobs.gather(1, targets[:, None]).double().sum().item())
            sums[name]["kl"].append(divergence.double().sum().item())
            sums[name]["top1"].append((logprobs.argmax(-1) == reference.argmax(-1)).double().sum().item())
    return {
        name: BlockSums(**{key: np.asarray(values) for key, values in columns.items()})
        for name, columns in sums.items()
    }

"""The rows of `benchmarks.distill`: what each starts from, and how it learns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SCRATCH_RATE = 1.5e-3
GENTLE_RATE = 1e-4


@dataclass(frozen=True)
class Way:
    """One row: what it starts from, and settings of the distillation; None where nothing is trained."""

    name: str
    start: str
    options: dict[str, Any] | None = None


DISTILLED = "repaired, distilled, all weights"
WAYS = (
    Way("cut", "cut"),
    Way("cut, repaired", "repaired"),
    Way("repaired, plain cross-entropy, all weights", "repaired", {"method": "ce", "lora_rank": 0}),
    Way("the same shape from scratch, distilled", "scratch", {"lora_rank": 0, "learning_rate": SCRATCH_RATE}),
    Way("repaired, distilled, LoRA of rank 16", "repaired", {}),
    Way(DISTILLED, "repaired", {"lora_rank": 0}),
    Way(
        "repaired, plain cross-entropy, a tenth of the learning rate",
        "repaired",
        {"method": "ce", "lora_rank": 0, "learning_rate": GENTLE_RATE},
    ),
    Way(
        "the same shape from scratch, plain cross-entropy",
        "scratch",
        {"method": "ce", "lora_rank": 0, "learning_rate": SCRATCH_RATE},
    ),
)


def _by(name: str, method: str | dict[str, Any], **options: Any) -> Way:
    return Way(name, "repaired", {"method": method, "lora_rank": 0, **options})


ANSWERS = {"calibration": {"answers": {"max_tokens": 64, "prompt_tokens": 32}}}
LOSSES = (
    Way("cut, repaired", "repaired"),
    Way(DISTILLED, "repaired", {"lora_rank": 0}),
    _by("`forward-kl`, `temperature: 2`", {"kind": "forward-kl", "temperature": 2.0}),
    _by("`reverse-kl`", "reverse-kl"),
    _by("`jsd`, `beta: 0.5`", "jsd"),
    _by("`skew-kl`, `alpha: 0.1`", "skew-kl"),
    _by("`topk-kl`, `k: 64`", "topk-kl"),
    _by("`topk-kl`, `k: 10`", {"kind": "topk-kl", "k": 10}),
    _by("`sampled-kl`, `draws: 10`", "sampled-kl"),
    _by("`hidden`, `distance: cosine`", "hidden"),
    _by("`hidden`, `distance: mse`", {"kind": "hidden", "distance": "mse"}),
    _by("`forward-kl` on the teacher's answers", "forward-kl", **ANSWERS),
    _by("`ce` on the teacher's answers", "ce", **ANSWERS),
    _by("`ce`", "ce"),
    _by("`on-policy`", "on-policy"),
)
"""Every loss by the same steps on all weights; the second row is `forward-kl`, which the others are held to."""

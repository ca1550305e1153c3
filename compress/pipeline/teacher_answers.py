"""The teacher's answers to prompts, written once: the text of a sequence-level distillation (Kim and Rush,
arXiv:1606.07947).

Who answers is given from outside; a shard of prompts gets a seed of its own, so that a resumed run has the answers of
one that was not disturbed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from compress.artifact.canonical import sha256_json
from compress.calibration.prompts import Prompts
from compress.pipeline import shards
from compress.progress import Progress
from compress.stages import AnswersConfig

VERSION = 1
SHARD_PROMPTS = 32

Answering = Callable[[list[list[int]], int], list[list[int]]]
"""(prompts, seed) -> the token ids of each answer, the end token among them where one ended it."""


def place(folder: Path, prompts: Prompts, config: AnswersConfig, teacher: str, seed: int) -> Path:
    """The directory of these answers under `folder`, by a hash over all that decides them; `teacher`: its digest."""
    content = {"version": VERSION, "teacher": teacher, "prompts": prompts.sha256, "seed": seed, "shard": SHARD_PROMPTS}
    return folder / sha256_json(content | config.model_dump(mode="json"))[:32]


def complete(path: Path, prompts: Prompts, answer: Answering, seed: int, progress: Progress) -> None:
    """Has the prompts answered that are not yet; errors are those of `shards.complete`, and of who answers."""

    def make(shard: int) -> dict[str, Tensor]:
        found = answer(_some(prompts, shard), (seed * 1_000_003 + shard) % 2**63)
        lengths = torch.tensor([len(each) for each in found], dtype=torch.int32)
        return {"lengths": lengths, "ids": torch.tensor([i for each in found for i in each], dtype=torch.int32)}

    shards.complete(path, _count(prompts), make, progress, f"the teacher answers {len(prompts.ids)} prompts")


def read(path: Path, prompts: Prompts) -> list[list[int]]:
    """One answer per prompt."""
    found: list[list[int]] = []
    for shard in range(_count(prompts)):
        stored = shards.read(path, shard)
        found += [each.tolist() for each in stored["ids"].split(stored["lengths"].tolist())]
    return found


def _count(prompts: Prompts) -> int:
    return -(-len(prompts.ids) // SHARD_PROMPTS)


def _some(prompts: Prompts, shard: int) -> list[list[int]]:
    return prompts.ids[shard * SHARD_PROMPTS : (shard + 1) * SHARD_PROMPTS]

"""What one model scored on one task, item by item. Free of torch and lm-eval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from compress.artifact.canonical import sha256_json

Kind = Literal["multiple_choice", "loglikelihood", "generate"]
Metric = Literal["acc", "acc_norm", "exact_match"]

JUDGING: tuple[Metric, ...] = ("acc", "exact_match", "acc_norm")
"""lm-eval's metrics that call an item right or wrong; of those that a task has, the first decides."""

DECIMALS = 9
"""Log-likelihoods are rounded to so many decimals before they are hashed."""


@dataclass(frozen=True, slots=True)
class ItemScore:
    """One item. `pred` is the index of the likeliest choice, whether greedy decoding gives the target (0 or 1), or the
    text that was compared.

    `choice_lls` are the choices' log-likelihoods in nats (multiple choice only); `nll` is minus that of the right
    choice or of the target, over `n_tok` tokens and `n_bytes` UTF-8 bytes; `answer` the text the model gave (generation
    only).
    `doc_hash` is over the item's data, `prompt_hash` over its id, prompt and choices as the model was given them.
    """

    item_id: str
    doc_hash: str
    prompt_hash: str
    correct: int
    pred: int | str
    choice_lls: tuple[float, ...] | None = None
    nll: float | None = None
    n_tok: int | None = None
    n_bytes: int | None = None
    answer: str | None = None

    def answers(self) -> list[object]:
        """What the model gave, as plain data that equal models give equally."""
        lls = None if self.choice_lls is None else [round(value, DECIMALS) for value in self.choice_lls]
        nll = None if self.nll is None else round(self.nll, DECIMALS)
        return [self.item_id, lls, nll, self.answer]


@dataclass(frozen=True, slots=True)
class TaskScores:
    """A task scored by one model; `items` are ordered by id. `pair` makes a record of one or two of them.

    `data_sha256` is over the items' data, `config_sha256` over the task's definition. `chance` is the expected accuracy
    of guessing, averaged over the items. `clusters` names, item by item, what belongs together. `metrics` holds
    further numbers of lm-eval's own, such as perplexity.
    """

    name: str
    kind: Kind
    metric: Metric
    data_sha256: str
    config_sha256: str
    items: tuple[ItemScore, ...]
    chance: float
    clusters: tuple[str, ...] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def correct(self) -> list[int]:
        """1 where an item was answered rightly."""
        return [item.correct for item in self.items]

    @property
    def item_ids(self) -> list[str]:
        """The items' ids, in order."""
        return [item.item_id for item in self.items]

    @property
    def accuracy(self) -> float:
        """Share of items answered rightly; NaN of none."""
        return sum(self.correct) / len(self.items) if self.items else math.nan

    @property
    def prompts_sha256(self) -> str:
        """Over (id, prompt, choices) of all items: equal hashes were asked the same questions in the same words."""
        return sha256_json([item.prompt_hash for item in self.items])

    @property
    def answers_sha256(self) -> str:
        """Over what the model gave for all items."""
        return sha256_json([item.answers() for item in self.items])

"""The projections between a student's hidden states and its teacher's, which learn beside the student."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.distillation import hidden
from compress.distillation.configs import HiddenConfig
from compress.pipeline.distill_teacher import Teacher


class Projections:
    """masters: (teacher width, student width) float32 of each compared pair of states, by a name."""

    def __init__(
        self, config: HiddenConfig, student: Any, student_blocks: int, teacher: Teacher, first: Tensor
    ) -> None:
        """Fits them to what both models say of the token ids `first` (windows, seq_len)."""
        self._config = config
        self.pairs = hidden.pairs(config, student_blocks, teacher.blocks)
        with torch.no_grad():
            own = student(input_ids=first, use_cache=False, output_hidden_states=True).hidden_states
        wanted = teacher.said("train-0", first, self.teacher_places)[1]
        self.masters = {
            f"projection.{place}": hidden.fitted(_tokens(own[place]), _tokens(goal)).requires_grad_()
            for (place, _), goal in zip(self.pairs, wanted, strict=True)
        }

    @property
    def teacher_places(self) -> list[int]:
        """Which of the teacher's hidden states are compared."""
        return [place for _, place in self.pairs]

    def loss(self, student_states: tuple[Tensor, ...], teacher_states: list[Tensor]) -> Tensor:
        """The weighted distance (tokens,) at the places that predict a token of the text."""
        own = [_predicting(student_states[place]) for place, _ in self.pairs]
        wanted = [_predicting(states) for states in teacher_states]
        far = hidden.distance(self._config.distance, own, wanted, list(self.masters.values()))
        return self._config.weight * far


def _tokens(states: Tensor) -> Tensor:
    return states.reshape(-1, states.shape[-1])


def _predicting(states: Tensor) -> Tensor:
    return _tokens(states[:, :-1])

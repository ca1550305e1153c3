"""A distillation made concrete: student, teacher, text, and what forbids the run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from compress import content
from compress.artifact.output import Identity
from compress.calibration import answered
from compress.calibration.prompts import Prompts, read_prompts
from compress.calibration.tokens import CalibrationSet, DrawnPart, draw
from compress.distillation.configs import HiddenConfig, OnPolicyConfig
from compress.errors import IntegrityError, UserError
from compress.formats.compressed_tensors import is_for_own_reader
from compress.models.checkpoint import Checkpoint
from compress.models.hub import local_directory
from compress.models.skeleton import Skeleton
from compress.pipeline import teacher_answers, team
from compress.pipeline.packed_student import Packed, Recorded
from compress.pipeline.work import Problem, Work, load_tokenizer
from compress.stages import AnswersConfig, DistillStage

CHUNK = 2
"""Windows that go through a model together: the unit of parallel work, of shuffling, and of a batch."""
SAME_TEXT = (
    "Once upon a time there were 3 kings — 'one', \"two\" and three;\n\tthey said: naïve?! 你好 🙂 {x: [1.5e-3]}\n"
)


@dataclass(frozen=True, kw_only=True)
class DistillJob(Work):
    """Everything a plan or a run of a distillation needs."""

    stage: DistillStage
    teacher: Checkpoint
    answers: Path | None = None
    """Where the teacher's answers are, of a stage that asks for them; a plan has none."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """What both models compute in; trl trains what it is given, so that is float32."""
        return torch.float32 if self.stage.method.own_text else self.skeleton.dtype

    @property
    def label(self) -> str:
        return f"lora{self.stage.lora_rank}" if self.stage.lora_rank else "full"

    @property
    def needs_blocks(self) -> bool:
        return False

    @property
    def needs_original(self) -> bool:
        return False

    @property
    def teacher_name(self) -> str:
        return self.teacher.path.resolve().name

    @property
    def stored_config(self) -> dict[str, Any]:
        """The student's config.json, which is the artifact's too."""
        found = self.checkpoint.source if isinstance(self.checkpoint, Packed) else self.checkpoint
        return dict(found.config)

    @cached_property
    def recorded(self) -> dict[str, Recorded]:
        """The grids of a quantised student's linears; empty for any other."""
        return self.checkpoint.recorded() if isinstance(self.checkpoint, Packed) else {}

    @cached_property
    def may_be_sparse(self) -> frozenset[str] | set[str]:
        """Linears whose zeros stay where they have many, or are on record; codes of few bits have many of others."""
        if isinstance(self.checkpoint, Packed):
            return self.sparse
        return {spec.name for spec in self.skeleton.linears()}

    @property
    def teacher_states(self) -> int:
        """How many hidden states of the teacher the loss compares at most."""
        method = self.stage.method
        if not isinstance(method, HiddenConfig):
            return 0
        return 1 if method.layers == "last" else self.skeleton.num_blocks

    @property
    def tokens_per_step(self) -> int:
        """How many tokens a step learns from, at most where the student writes them."""
        method = self.stage.method
        each = method.max_tokens if isinstance(method, OnPolicyConfig) else self.stage.calibration.seq_len
        return self.stage.batch_size * each

    @property
    def answers_config(self) -> AnswersConfig:
        """How the teacher answers, where the stage asks for answers."""
        assert self.stage.calibration.answers is not None
        return self.stage.calibration.answers

    @cached_property
    def prompts(self) -> Prompts:
        """What the teacher is to answer."""
        return read_prompts(self.stage.calibration.source, self.tokenizer, self.answers_config.prompt_tokens)

    @cached_property
    def calibration(self) -> CalibrationSet:
        """All windows, those held out first."""
        found = self._drawn() if self.stage.calibration.answers is None else self._answered()
        wanted = self.stage.calibration
        if found.tokens.shape[0] < wanted.held_out + self.stage.batch_size:
            raise UserError(
                f"{found.name} has {found.tokens.shape[0]} windows of {wanted.seq_len} tokens: too few for "
                f"{wanted.held_out} held out and a batch of {self.stage.batch_size}",
                "give a longer text, a shorter --seq-len, or a smaller batch",
            )
        return found

    def refuse_long_windows(self) -> None:
        """Raises UserError where a window is longer than what both models were made for."""
        wanted, longest = self.stage.calibration.seq_len, min(self.skeleton.max_positions, _positions(self.teacher))
        if wanted > longest:
            raise UserError(
                f"windows of {wanted} tokens exceed the models' context of {longest}",
                f"use --seq-len {longest} or less",
            )

    def _drawn(self) -> CalibrationSet:
        wanted = self.stage.calibration
        rows = int(self.teacher.config.get("vocab_size") or self.skeleton.vocabulary)
        return draw(
            wanted.source,
            self.tokenizer,
            samples=wanted.samples,
            seq_len=wanted.seq_len,
            seed=self.recipe.seed,
            longest=min(self.skeleton.max_positions, _positions(self.teacher)),
            vocabulary=min(self.skeleton.vocabulary, rows),
        )

    def _answered(self) -> CalibrationSet:
        """Windows of prompts and answers; in a plan, of the longest answers that may come."""
        self.refuse_long_windows()
        asked, wanted = self.prompts, self.stage.calibration
        longest = [[0] * self.answers_config.max_tokens] * len(asked.ids)
        answers = longest if self.answers is None else teacher_answers.read(self.answers, asked)
        tokens, counted = answered.windows(asked.ids, answers, wanted.seq_len, self.recipe.seed)
        tokens, counted = tokens[: wanted.samples], counted[: wanted.samples]
        digest = hashlib.sha256(tokens.numpy().tobytes() + counted.numpy().tobytes()).hexdigest()
        part = DrawnPart(asked.name, asked.kind, asked.sha256, len(tokens))
        name = f"{asked.name}, answered by {self.teacher_name}"
        return CalibrationSet(tokens, name, digest, self.recipe.seed, (part,), counted)

    @property
    def held_out(self) -> list[torch.Tensor]:
        """Chunks (windows, seq_len) that are only measured on."""
        return self._held_out(self.calibration.tokens)

    @property
    def training(self) -> list[torch.Tensor]:
        """Chunks (CHUNK, seq_len) that the student learns on."""
        return self._training(self.calibration.tokens)

    @property
    def held_out_counts(self) -> list[torch.Tensor]:
        """Of each chunk, which predictions count (windows, seq_len - 1), bool."""
        return [mask[:, 1:] for mask in self._held_out(self._counted)]

    @property
    def training_counts(self) -> list[torch.Tensor]:
        """Of each chunk, which predictions count (CHUNK, seq_len - 1), bool."""
        return [mask[:, 1:] for mask in self._training(self._counted)]

    @property
    def _counted(self) -> torch.Tensor:
        found = self.calibration
        return torch.ones_like(found.tokens, dtype=torch.bool) if found.counted is None else found.counted

    def _held_out(self, windows: torch.Tensor) -> list[torch.Tensor]:
        return list(windows[: self.stage.calibration.held_out].split(CHUNK))

    def _training(self, windows: torch.Tensor) -> list[torch.Tensor]:
        chunks = windows[self.stage.calibration.held_out :].split(CHUNK)
        return [chunk for chunk in chunks if chunk.shape[0] == CHUNK]

    def identity(self, *, hashed: bool = True) -> Identity:
        found = super().identity(hashed=hashed)
        environment = dict(found.environment)
        if self.stage.minutes is not None and self.stage.steps is not None:
            environment["steps"] = str(self.stage.steps)  # which the recipe's hash leaves out
        others = (self.teacher.digest(),) if hashed else ()
        return replace(found, environment=environment, others=others)


def assign(
    stage: DistillStage, checkpoint: Checkpoint, skeleton: Skeleton, teacher: str | Path | None
) -> tuple[Checkpoint, list[Problem]]:
    """The opened teacher, and what forbids the run.

    Raises:
        UserError: no such teacher, a missing tokenizer.
        IntegrityError: the two read a text into different tokens.
    """
    found = Checkpoint.open(local_directory(teacher or content.default_model()))
    require_same_tokens(found, checkpoint)
    problems = team.problems(stage, stage.batch_size // CHUNK)
    if is_for_own_reader(found.config.get("quantization_config")):
        said = f"the teacher {found.path} is stored for our own reader alone, and transformers runs teachers"
        problems.append(Problem(said, f"give a dense copy: `compress export {found.path} --to dense`"))
    if found.path.samefile(checkpoint.path):
        problems.append(Problem("teacher and student are the same model", "give a smaller or damaged one as --student"))
    return found, problems


def require_same_tokens(teacher: Checkpoint, student: Checkpoint) -> None:
    """Raises IntegrityError unless both tokenizers give every id the same meaning; one may have more ids."""
    if teacher.tokenizer_digest() == student.tokenizer_digest():
        return
    ours, theirs = load_tokenizer(student), load_tokenizer(teacher)
    small, large = sorted((ours.get_vocab(), theirs.get_vocab()), key=len)
    differing = next((token for token, number in sorted(small.items()) if large.get(token) != number), None)
    if differing is None and ours(SAME_TEXT)["input_ids"] == theirs(SAME_TEXT)["input_ids"]:
        return
    what = f"token {differing!r} has another id, or none" if differing is not None else "they split a text differently"
    raise IntegrityError(
        f"teacher {teacher.path.name} and student {student.path.name} have different tokenizers: {what}",
        "a student learns token by token from a teacher that reads the same tokens: give the model it was made from",
    )


def _positions(checkpoint: Checkpoint) -> int:
    config: dict[str, Any] = checkpoint.config
    known = config.get("max_position_embeddings") or config.get("n_positions")
    return int(known) if known else 1 << 30

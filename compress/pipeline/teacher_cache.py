"""What a teacher says of a text, written once: a few of its tokens at every place, for any number of trainings.

They are the most likely ones, or drawn from it, as the loss wants them.

    CACHE/<key>/shards.jsonl          one checksummed line per finished shard, the only authority on what is there
    CACHE/<key>/shard-00000.safetensors   ids (chunks, places, k) and log-probabilities (float16) of as many chunks

The key is a hash over all that decides the content: format version, teacher, tokens, k or the draws and their seed,
vocabulary, compute dtype. A killed writer goes on behind its last finished shard; a shard that is damaged is written
again. Before a cache is used a few of its chunks are scored anew by the teacher.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from compress.artifact.canonical import sha256_json
from compress.distillation import losses
from compress.distillation.configs import TopKConfig
from compress.errors import IntegrityError, UserError
from compress.pipeline import shards
from compress.pipeline.distill_job import DistillJob
from compress.pipeline.distill_teacher import Teacher
from compress.progress import Progress

VERSION = 1
SHARD_CHUNKS = 64
MOST_BYTES = 60
"""Per token."""
CHECKED_CHUNKS = 3
CHECK_TOLERANCE = 0.05
SHORT_IDS = 1 << 16


def bytes_per_token(k: int, vocabulary: int) -> int:
    """Stored bytes of one place of the text."""
    return k * (2 + (2 if vocabulary <= SHORT_IDS else 4))


class TeacherCache:
    """A few tokens at every place of every training chunk, by its number, among the ids below `vocabulary`."""

    def __init__(self, job: DistillJob, teacher: Teacher, progress: Progress) -> None:
        """Opens the cache of this job and writes what it lacks.

        Raises:
            UserError: more than MOST_BYTES per token, or another process is writing this cache.
            IntegrityError: its content is not what this teacher says.
            WorkError: it cannot be written.
        """
        assert job.stage.cache is not None
        self._job, self._method, self._teacher = job, job.stage.method, teacher
        self._k = k = losses.kept_width(self._method)
        self._chunks = job.training
        self.vocabulary = min(job.skeleton.vocabulary, teacher.vocabulary)
        need = bytes_per_token(k, self.vocabulary)
        if need > MOST_BYTES:
            most = MOST_BYTES // (need // k)
            what = "k" if isinstance(self._method, TopKConfig) else "draws"
            raise UserError(
                f"a teacher cache of {k} tokens takes {need} bytes per token, and at most {MOST_BYTES} are kept",
                f"use {what}: {most} or less in the recipe's method",
            )
        self.path = Path(job.stage.cache) / self._key()
        count = -(-len(self._chunks) // SHARD_CHUNKS)
        shards.complete(self.path, count, self._made, progress, "writing down what the teacher says")
        self._shards: dict[int, dict[str, Tensor]] = {}
        self._check()

    def read(self, number: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities (tokens, k) float32 and ids (tokens, k) int64 of one training chunk."""
        shard, place = divmod(number, SHARD_CHUNKS)
        if shard not in self._shards:
            self._shards[shard] = shards.read(self.path, shard)
        stored = self._shards[shard]
        return stored["log_probabilities"][place].float(), stored["ids"][place].to(torch.int64)

    def _key(self) -> str:
        job = self._job
        drawn = {} if isinstance(self._method, TopKConfig) else {"drawn_with": job.recipe.seed}
        return sha256_json(
            {
                **drawn,
                "version": VERSION,
                "teacher": job.teacher.digest(),
                "tokens": job.calibration.sha256,
                "held_out": job.stage.calibration.held_out,
                "k": self._k,
                "vocabulary": self.vocabulary,
                "dtype": str(job.skeleton.dtype),
            }
        )[:32]

    def _made(self, shard: int) -> dict[str, Tensor]:
        first = shard * SHARD_CHUNKS
        found = [self._live(number) for number in range(first, min(first + SHARD_CHUNKS, len(self._chunks)))]
        short = torch.uint16 if self.vocabulary <= SHORT_IDS else torch.int32
        return {
            "log_probabilities": torch.stack([values.to(torch.float16) for values, _ in found]),
            "ids": torch.stack([ids.to(short) for _, ids in found]),
        }

    def _live(self, number: int) -> tuple[Tensor, Tensor]:
        return self._kept(number, self._logits(number))

    def _kept(self, number: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        return losses.kept(self._method, logits, drawing_seed(self._job, number))

    def _logits(self, number: int) -> Tensor:
        logits = self._teacher.logits(f"train-{number}", self._chunks[number])[:, :-1]
        return logits.reshape(-1, logits.shape[-1])[:, : self.vocabulary].float()

    def _check(self) -> None:
        """Scores a few chunks anew, the first and the last among them."""
        last = len(self._chunks) - 1
        for number in sorted({round(i * last / (CHECKED_CHUNKS - 1)) for i in range(CHECKED_CHUNKS)}):
            values, ids = self.read(number)
            logits = self._logits(number)
            far = (values.exp() - logits.softmax(-1).gather(-1, ids)).abs().max()
            same = (ids[:, 0] == self._kept(number, logits)[1][:, 0]).float().mean()
            if not float(far) <= CHECK_TOLERANCE or float(same) < 0.95:
                raise IntegrityError(
                    f"the teacher cache {self.path} does not hold what {self._job.teacher_name} says of this text",
                    "remove it: it is written again",
                )


def drawing_seed(job: DistillJob, number: int) -> int:
    """What the draws at a training chunk are seeded with: the same in every epoch, as a cache has them."""
    return job.recipe.seed * 1_000_003 + number

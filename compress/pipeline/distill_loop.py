"""The steps of a training: gradients chunk by chunk, AdamW on float32 masters, the held-out KL that decides what stays.

A batch is cut into the same chunks whatever the machine, each chunk is computed on one thread, and sums are taken in a
fixed order, so the bytes do not depend on the number of threads. The order of chunks follows from seed and epoch alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.distillation import losses
from compress.distillation.configs import HiddenConfig
from compress.distillation.divergences import forward_kl
from compress.errors import WorkError
from compress.pipeline.block import Workers
from compress.pipeline.distill_hidden import Projections
from compress.pipeline.distill_job import CHUNK, DistillJob
from compress.pipeline.distill_student import Student
from compress.pipeline.distill_teacher import Teacher
from compress.pipeline.teacher_cache import TeacherCache, drawing_seed

if TYPE_CHECKING:
    from compress.pipeline.team import Team

EVALUATIONS = 20
CLIP = 1.0
BETAS = (0.9, 0.95)
RATES = {True: 6e-3, False: 1e-3}
"""Learning rates by whether adapters are trained, up to RATES_WIDTH; wider models take less in proportion."""
RATES_WIDTH = 256


def learning_rate(job: DistillJob) -> float:
    """What the recipe says, or the usual for what is trained and for the width of the model."""
    width = int(job.checkpoint.config.get("hidden_size") or RATES_WIDTH)
    usual = RATES[bool(job.stage.lora_rank)] * min(1.0, RATES_WIDTH / width)
    return job.stage.learning_rate or usual


@dataclass
class Progressed:
    """How far a training is. best: the masters at the lowest held-out KL, None before the first measurement."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    best: dict[str, Tensor] | None = None

    @property
    def best_step(self) -> int:
        return min(self.held_out, key=lambda point: point[1])[0]

    def stopped(self, patience: int, warm: int) -> bool:
        """Whether so many measurements in a row brought nothing better; those up to step `warm` do not count."""
        counted = [step for step, _ in self.held_out if step > warm]
        return bool(counted) and sum(step > self.best_step for step in counted) >= patience


class Loop:
    """Takes a student from step to step. `steps` plans the learning rate and when to measure."""

    def __init__(self, job: DistillJob, student: Student, teacher: Teacher, workers: Workers, steps: int) -> None:
        self.job, self.student, self.teacher, self.workers, self.steps = job, student, teacher, workers, steps
        self.cache: TeacherCache | None = None
        self.team: Team | None = None
        self.progressed = Progressed()
        self.training, self.held_out = job.training, job.held_out
        self._counts, self._held_counts = job.training_counts, job.held_out_counts
        self.chunks_per_step = job.stage.batch_size // CHUNK
        self._epoch: tuple[int, list[int]] = (-1, [])
        self.rate = learning_rate(job)
        self.projections: Projections | None = None
        if isinstance(job.stage.method, HiddenConfig):
            blocks = job.skeleton.num_blocks
            self.projections = Projections(job.stage.method, student.model, blocks, teacher, self.training[0])
        self.learned = student.masters | (self.projections.masters if self.projections else {})
        if job.stage.method.own_text:  # trl steps the model's parameters, which share their memory with the masters
            self.learned = dict(student.parameters)
        self.optimizer = torch.optim.AdamW(
            list(self.learned.values()), lr=self.rate, betas=BETAS, weight_decay=0.0, foreach=False
        )

    @property
    def every(self) -> int:
        """Steps between two measurements."""
        return max(1, math.ceil(self.steps / EVALUATIONS))

    @property
    def held_out_tokens(self) -> int:
        """Predictions that the held-out KL is the mean of."""
        return sum(int(counted.sum()) for counted in self._held_counts)

    @property
    def finished(self) -> bool:
        """Whether no step is left, or nothing gets better; a high learning rate may cost something at first."""
        done = self.progressed.step >= self.steps
        return done or self.progressed.stopped(self.job.stage.patience, warm=self.steps // 4)

    def measure(self) -> float:
        """Held-out KL now; it is noted, and the masters are kept if it is the lowest. WorkError if it is not finite."""
        kl = self.held_out_kl()
        best = min((value for _, value in self.progressed.held_out), default=math.inf)
        self.progressed.held_out.append((self.progressed.step, kl))
        if kl < best:
            self.progressed.best = {name: master.clone() for name, master in self.student.masters.items()}
        return kl

    def measure_if_due(self) -> float:
        """Measures where the step that was taken last calls for it; returns the newest held-out KL."""
        step = self.progressed.step
        if step % self.every == 0 or step == self.steps:
            self.measure()
        return self.progressed.held_out[-1][1]

    def held_out_kl(self) -> float:
        """KL(teacher || student) per token of the held-out windows."""
        team = self.team
        sums = self.held_out_sums(range(len(self.held_out))) if team is None else team.held_out_sums()
        kl = math.fsum(sums) / self.held_out_tokens
        self._refuse_if_not_finite(kl, "held-out KL")
        return kl

    def held_out_sums(self, numbers: Sequence[int]) -> list[float]:
        """The KL summed over the counted tokens of each of these held-out chunks."""
        return list(self.workers.pool.map(self._kl, numbers))

    @torch.no_grad()
    def _kl(self, number: int) -> float:
        key, ids, counted = f"held-{number}", self.held_out[number], self._held_counts[number]
        student = _predictions(self.student.model(input_ids=ids, use_cache=False).logits)
        teacher = _predictions(self.teacher.logits(key, ids))
        each = forward_kl(*losses.shared_vocabulary(teacher, student))
        return float(each[counted.reshape(-1)].double().sum())

    def step(self) -> float:
        """One step of AdamW; returns the batch's mean loss. WorkError if it is not finite."""
        gradients, loss = self.gradients(self.batch(self.progressed.step))
        self._refuse_if_not_finite(loss, "loss")
        norm = math.sqrt(math.fsum(float(gradient.double().pow(2).sum()) for gradient in gradients))
        self._refuse_if_not_finite(norm, "gradient")
        scale = min(1.0, CLIP / (norm + 1e-12))
        for (name, master), gradient in zip(self.learned.items(), gradients, strict=True):
            kept = self.student.kept.get(name)
            master.grad = gradient.mul_(scale) if kept is None else gradient.mul_(scale).mul_(kept)
        self.optimizer.param_groups[0]["lr"] = self.rate * self.share(self.progressed.step)
        self.optimizer.step()
        self.student.use_masters()
        self.progressed.step += 1
        self.progressed.losses.append(loss)
        return loss

    def gradients(self, batch: list[int]) -> tuple[list[Tensor], float]:
        """Gradients of the batch's mean loss in float32, in the order of `learned`, and that loss."""
        if self.team is not None:
            return self.team.gradients(batch)
        return self.summed(batch, self.tokens_of(batch))

    def tokens_of(self, batch: list[int]) -> int:
        """Predictions that the mean over a batch is taken of."""
        return max(1, sum(int(self._counts[number].sum()) for number in batch))

    def summed(
        self, numbers: list[int], tokens: int, before: Callable[[], tuple[list[Tensor], float]] | None = None
    ) -> tuple[list[Tensor], float]:
        """Gradients and loss of these chunks of a batch of so many tokens, added in their order.

        before: gives the sums of the chunks before these; asked for while these are computed.
        """
        found = self.workers.pool.map(lambda number: self._chunk(number, tokens), numbers)
        sums, total = next(found) if before is None else before()
        for gradients, loss in found:
            total += loss
            for whole, part in zip(sums, gradients, strict=True):
                whole.add_(part)
        return sums, total

    def _chunk(self, number: int, tokens: int) -> tuple[list[Tensor], float]:
        """Gradients and loss of one chunk, as shares of a batch of so many counted tokens."""
        ids = self.training[number]
        method, projections = self.job.stage.method, self.projections
        teacher: Tensor | None = None
        states: list[Tensor] = []
        if method.taught and self.cache is None:
            places = projections.teacher_places if projections else []
            logits, states = self.teacher.said(f"train-{number}", ids, places)
            teacher = _predictions(logits)
        with torch.enable_grad():
            output = self.student.model(input_ids=ids, use_cache=False, output_hidden_states=projections is not None)
            student = _predictions(output.logits)
            if self.cache is not None:
                each = losses.kept_loss(method, *self.cache.read(number), student[:, : self.cache.vocabulary])
            else:
                seed = drawing_seed(self.job, number)
                each = losses.loss(method, student, teacher, ids[:, 1:].reshape(-1), seed)
            if projections is not None:
                each = each + projections.loss(output.hidden_states, states)
            loss = each[self._counts[number].reshape(-1)].sum() / tokens
            parameters = [*self.student.parameters.values(), *(projections.masters.values() if projections else ())]
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        dense = [p.new_zeros(p.shape) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
        return [gradient.float() for gradient in dense], float(loss.detach())

    def batch(self, step: int) -> list[int]:
        """Numbers of the chunks of one step: epochs follow each other, each in an order of its own."""
        first = step * self.chunks_per_step
        return [self._at(place) for place in range(first, first + self.chunks_per_step)]

    def _at(self, place: int) -> int:
        epoch, within = divmod(place, len(self.training))
        return self._order(epoch)[within]

    def _order(self, epoch: int) -> list[int]:
        if self._epoch[0] == epoch:
            return self._epoch[1]
        generator = torch.Generator().manual_seed((self.job.recipe.seed * 1_000_003 + epoch) % 2**63)
        order: list[int] = torch.randperm(len(self.training), generator=generator).tolist()
        self._epoch = epoch, order
        return order

    def share(self, step: int) -> float:
        """Of the learning rate: a linear rise over a tenth of the steps, at most 20, then half a cosine to 0."""
        rise = max(1, min(20, self.steps // 10))
        return min(1.0, (step + 1) / rise) * 0.5 * (1.0 + math.cos(math.pi * step / self.steps))

    def _refuse_if_not_finite(self, value: float, what: str) -> None:
        if not math.isfinite(value) and self.progressed.step == 0:
            raise WorkError(
                f"the {what} is {value} before the first step: teacher or student gives logits that are not finite",
                "score both with `compress eval`: one of them is damaged, or overflows in its own dtype",
            )
        if not math.isfinite(value):
            raise WorkError(
                f"the {what} is {value} at step {self.progressed.step}: training diverged",
                "use a smaller --learning-rate, or another --loss; nothing was published",
            )

    def state(self) -> dict[str, Tensor]:
        """All that the next step needs besides `progressed`'s numbers."""
        tensors = {f"master.{name}": master.detach() for name, master in self.learned.items()}
        for name, master in self.learned.items():
            kept = self.optimizer.state.get(master)
            if kept:
                tensors |= {f"first.{name}": kept["exp_avg"], f"second.{name}": kept["exp_avg_sq"]}
        return tensors | {f"best.{name}": tensor for name, tensor in (self.progressed.best or {}).items()}

    def restore(self, progressed: Progressed, tensors: dict[str, Tensor]) -> None:
        """Goes on where `state` and `progressed` were taken."""
        self.progressed = progressed
        best = {name: tensors[f"best.{name}"].clone() for name in self.student.masters if f"best.{name}" in tensors}
        progressed.best = best or None
        for name, master in self.learned.items():
            with torch.no_grad():
                master.copy_(tensors[f"master.{name}"])
            if f"first.{name}" in tensors:
                self.optimizer.state[master] = {
                    "step": torch.tensor(float(progressed.step)),
                    "exp_avg": tensors[f"first.{name}"].clone(),
                    "exp_avg_sq": tensors[f"second.{name}"].clone(),
                }
        self.student.use_masters()


def _predictions(logits: Tensor) -> Tensor:
    """Logits (windows, seq_len, vocabulary) -> those that predict a token of the text, (tokens, vocabulary) float32."""
    return logits[:, :-1].reshape(-1, logits.shape[-1]).float()

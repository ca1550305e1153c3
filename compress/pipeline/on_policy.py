"""On-policy distillation: the student continues prompts by itself, and the teacher tells it how likely each token was.

Generalised knowledge distillation (Agarwal et al., arXiv:2306.13649), done by trl's DistillationTrainer. Prompts are
how the training windows begin. What surrounds it is as for every other loss: the held-out KL decides what is kept, and
a checkpoint is weights, moments and a step. For that to be all, prompts and draws of a step follow from seed and step
alone, and the trainer is given the steps that are missing.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from compress.distillation.configs import OnPolicyConfig
from compress.errors import UserError, WorkError
from compress.models.checkpoint import Checkpoint
from compress.models.skeleton import Skeleton
from compress.pipeline.distill_job import DistillJob
from compress.pipeline.distill_loop import CLIP, Loop
from compress.pipeline.packed_student import Packed
from compress.pipeline.work import Problem
from compress.progress import Progress


def problems(method: OnPolicyConfig, student: Checkpoint, skeleton: Skeleton, teacher: Checkpoint) -> list[Problem]:
    """What forbids an on-policy run of these two."""
    found = []
    if isinstance(student, Packed):
        said = "a quantised student cannot learn on-policy: trl knows nothing of its grid"
        found.append(Problem(said, "use another --loss, or distil before quantising"))
    rows = int(teacher.config.get("vocab_size") or skeleton.vocabulary)
    if rows != skeleton.vocabulary:
        said = f"on-policy needs equal vocabularies: the teacher has {rows} ids, the student {skeleton.vocabulary}"
        found.append(Problem(said, "use forward-kl, which cuts the longer one"))
    length = method.prompt_tokens + method.max_tokens
    if length > skeleton.max_positions:
        said = f"prompts and answers of {length} tokens exceed the student's context of {skeleton.max_positions}"
        found.append(Problem(said, "lower `max_tokens` or `prompt_tokens` in the recipe's method"))
    return found


def train(job: DistillJob, loop: Loop, teacher: Any, progress: Progress, passed: Callable[[], None]) -> None:
    """Takes the steps that `loop` lacks. teacher: the live model; passed: called behind every step.

    Raises:
        UserError: trl is missing, or too old.
        WorkError: the loss is not finite.
    """
    config, trainer = _trl()
    if loop.finished:
        return
    from datasets import Dataset
    from transformers import PrinterCallback, ProgressCallback

    method, done = job.stage.method, loop.progressed.step
    assert isinstance(method, OnPolicyConfig)
    logging.getLogger("trl").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="compress-trl-") as folder, torch.random.fork_rng(devices=[]):
        settings = config(
            output_dir=folder,
            max_steps=loop.steps - done,
            per_device_train_batch_size=job.stage.batch_size,
            shuffle_dataset=False,
            max_grad_norm=CLIP,
            beta=method.beta,
            temperature=method.temperature,
            max_completion_length=method.max_tokens,
            disable_dropout=True,
            seed=job.recipe.seed % 2**32,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            logging_nan_inf_filter=False,
            disable_tqdm=True,
        )
        made = trainer(
            model=loop.student.model,
            teacher_model=teacher,
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": _prompts(job, loop, method.prompt_tokens)}),
            processing_class=job.tokenizer,
            callbacks=[_following(loop, progress, passed)],
            optimizers=(loop.optimizer, LambdaLR(loop.optimizer, lambda step: loop.share(done + step))),
        )
        for printing in (PrinterCallback, ProgressCallback):
            made.remove_callback(printing)
        with torch.enable_grad():
            made.train()


def _prompts(job: DistillJob, loop: Loop, tokens: int) -> list[str]:
    """The prompts of all steps that are missing, one step's behind the other's."""
    texts = [job.tokenizer.batch_decode(chunk[:, :tokens], skip_special_tokens=True) for chunk in loop.training]
    steps = range(loop.progressed.step, loop.steps)
    return [text for step in steps for number in loop.batch(step) for text in texts[number]]


def _trl() -> tuple[Any, Any]:
    try:
        from trl import DistillationConfig, DistillationTrainer
    except ImportError:
        raise UserError(
            "on-policy distillation needs trl with its DistillationTrainer, which is not installed",
            "pip install 'compress[distill]', or use another --loss",
        ) from None
    return DistillationConfig, DistillationTrainer


def _following(loop: Loop, progress: Progress, passed: Callable[[], None]) -> Any:
    """What seeds every step, keeps zeros, measures and notes while trl trains."""
    from transformers import TrainerCallback

    student = loop.student

    class Following(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            torch.manual_seed((loop.job.recipe.seed * 1_000_003 + loop.progressed.step) % 2**63)

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            with torch.no_grad():
                for name, kept in student.kept.items():
                    if (parameter := student.parameters.get(name)) is not None:
                        parameter.mul_(kept)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
            if logs is None or "loss" not in logs:
                return
            loop.progressed.step += 1
            loss = float(logs["loss"])
            if not math.isfinite(loss):
                raise WorkError(
                    f"the loss is {loss} at step {loop.progressed.step}: training diverged",
                    "use a smaller --learning-rate, or another --loss; nothing was published",
                )
            loop.progressed.losses.append(loss)
            kl = loop.measure_if_due()
            progress.advance(f"loss {loss:.4f}, held-out KL {kl:.4f}")
            passed()
            control.should_training_stop = control.should_training_stop or loop.finished

    return Following()

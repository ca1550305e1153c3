"""On-policy distillation: the student continues prompts by itself, and the teacher tells it how likely each token was.

Generalised knowledge distillation (Agarwal et al., arXiv:2306.13649), done by trl's DistillationTrainer. Prompts are
how the training windows begin. What surrounds it is as for every other loss: the held-out KL decides what is kept.
A run that was killed begins its training anew, and ends in the same bytes.
"""

from __future__ import annotations

import logging
import math
import tempfile
from typing import Any

import torch

from compress.distillation.configs import OnPolicyConfig
from compress.errors import UserError, WorkError
from compress.models.checkpoint import Checkpoint
from compress.models.skeleton import Skeleton
from compress.pipeline.distill_job import DistillJob
from compress.pipeline.distill_loop import BETAS, CLIP, Loop
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


def train(job: DistillJob, loop: Loop, teacher: Any, progress: Progress) -> None:
    """Takes all steps on the student of `loop`, whose float32 parameters are its masters; `teacher`: the live model.

    Raises:
        UserError: trl is missing, or too old.
        WorkError: the loss is not finite.
    """
    config, trainer = _trl()
    from datasets import Dataset
    from transformers import PrinterCallback, ProgressCallback

    method = job.stage.method
    assert isinstance(method, OnPolicyConfig)
    windows = job.calibration.tokens[job.stage.calibration.held_out :, : method.prompt_tokens]
    prompts = job.tokenizer.batch_decode(windows, skip_special_tokens=True)
    logging.getLogger("trl").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="compress-trl-") as folder, torch.random.fork_rng(devices=[]):
        settings = config(
            output_dir=folder,
            max_steps=loop.steps,
            per_device_train_batch_size=job.stage.batch_size,
            learning_rate=loop.rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, min(20, loop.steps // 10)),
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            max_grad_norm=CLIP,
            weight_decay=0.0,
            optim="adamw_torch",
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
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=job.tokenizer,
            callbacks=[_following(loop, progress)],
        )
        for printing in (PrinterCallback, ProgressCallback):
            made.remove_callback(printing)
        progress.begin(f"training ({job.method_name}, {job.label})", loop.steps)
        with torch.enable_grad():
            made.train()
        progress.end()


def _trl() -> tuple[Any, Any]:
    try:
        from trl import DistillationConfig, DistillationTrainer
    except ImportError:
        raise UserError(
            "on-policy distillation needs trl with its DistillationTrainer, which is not installed",
            "pip install 'compress[distill]', or use another --loss",
        ) from None
    return DistillationConfig, DistillationTrainer


def _following(loop: Loop, progress: Progress) -> Any:
    """What keeps zeros, measures and notes while trl trains."""
    from transformers import TrainerCallback

    student = loop.student

    class Following(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            with torch.no_grad():
                for name, parameter in student.parameters.items():
                    if (kept := student.kept.get(name)) is not None:
                        parameter.mul_(kept)
                    if parameter.data_ptr() != student.masters[name].data_ptr():
                        student.masters[name].copy_(parameter)
            loop.progressed.step = int(state.global_step)
            if loop.progressed.step % loop.every == 0 or loop.progressed.step == loop.steps:
                loop.measure()
            progress.advance(f"held-out KL {loop.progressed.held_out[-1][1]:.4f}")
            control.should_training_stop = control.should_training_stop or loop.finished

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
            if logs is None or "loss" not in logs:
                return
            if not math.isfinite(float(logs["loss"])):
                raise WorkError(
                    f"the loss is {logs['loss']} at step {state.global_step}: training diverged",
                    "use a smaller --learning-rate, or another --loss; nothing was published",
                )
            loop.progressed.losses.append(float(logs["loss"]))

    return Following()

"""lm-eval's own `hf` model on the tasks that the harness resolves: the oracle of scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from compress.evaluation.harness.run import resolve
from compress.evaluation.suites import SEED, SuiteTask


def hf_model(path: Path, batch_size: int = 8) -> HFLM:
    """The model in float32 on the CPU."""
    return HFLM(pretrained=str(path), device="cpu", dtype="float32", batch_size=batch_size)


def hf_samples(model: HFLM, tasks: list[SuiteTask]) -> dict[str, list[dict[str, Any]]]:
    """lm-eval's samples by task, its loop and its templates untouched."""
    loaded = TaskManager(include_defaults=False).load([resolve(task).config for task in tasks])
    for made in loaded["tasks"].values():
        made.set_config("num_fewshot", made.config.num_fewshot or 0)
        made.set_fewshot_seed(SEED)
    found: dict[str, list[dict[str, Any]]] = evaluate(lm=model, task_dict=loaded, bootstrap_iters=0, log_samples=True)[
        "samples"
    ]
    return found


def request(kind: str, *arguments: Any) -> Instance:
    """One request as lm-eval makes it."""
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)

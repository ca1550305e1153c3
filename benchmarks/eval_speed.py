"""Speed of the evaluation harness against lm-eval's own `hf` model on the same tasks and items, at equal scores.

    python -m benchmarks.eval_speed --model DIR --suite pr --threads 1 --json benchmarks/results/eval-speed.json

Both sides run in this process, alternating, on models loaded beforehand: lm-eval's evaluation loop over the same
prompts, once with our runtime as the model (--kernel as in `compress eval`) and once with HFLM in float32. HFLM runs
with each of --batch-sizes once, and then with the one that was fastest. Each round gives a ratio; the table has their
median and spread, in wall time and in CPU time, which a busy machine disturbs less. Texts and generated answers of the
suite are left out: lm-eval cuts texts otherwise. Scores are compared item by item before anything is reported.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from benchmarks import machine
from compress import content
from compress.evaluation.harness import TaskScores, run_tasks
from compress.evaluation.harness.run import resolve
from compress.evaluation.scoring_kernel import open_runtime
from compress.evaluation.suites import SEED, SuiteTask, load_suite

TOLERANCE = 1e-5

Timed = tuple[float, float, Any]


def timed(work: Callable[[], Any]) -> Timed:
    """Wall seconds, CPU seconds and what the work gave."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return time.perf_counter() - wall, time.process_time() - cpu, found


def hf(model: Path, batch_size: int) -> HFLM:
    return HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=batch_size)


def run_hf(lm: HFLM, tasks: list[SuiteTask]) -> dict[str, Any]:
    """lm-eval's samples by task."""
    loaded = TaskManager(include_defaults=False).load([resolve(task).config for task in tasks])
    for made in loaded["tasks"].values():
        made.set_config("num_fewshot", made.config.num_fewshot or 0)
        made.set_fewshot_seed(SEED)
    return evaluate(lm=lm, task_dict=loaded, bootstrap_iters=0, log_samples=True)["samples"]


def worst_difference(ours: list[TaskScores], theirs: dict[str, Any]) -> float:
    """Largest relative difference of a log-likelihood. SystemExit where an item is judged otherwise."""
    worst = 0.0
    for task in ours:
        metric = "acc" if task.metric == "exact_match" else task.metric
        for item, sample in zip(task.items, theirs[task.name], strict=True):
            if item.correct != int(sample[metric]):
                raise SystemExit(f"error: {task.name} {item.item_id} is judged otherwise by lm-eval's hf model")
            given = [answers[0][0] for answers in sample["resps"]]
            own = item.choice_lls if item.choice_lls is not None else (-(item.nll or 0.0),)
            worst = max(worst, *(abs(a - b) / abs(b) for a, b in zip(own, given, strict=True)))
    if worst > TOLERANCE:
        raise SystemExit(f"error: log-likelihoods differ by {worst:.1e}")
    return worst


def spread(ratios: list[float]) -> dict[str, float]:
    return {
        "ratio": round(statistics.median(ratios), 3),
        "least": round(min(ratios), 3),
        "greatest": round(max(ratios), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=content.default_model())
    parser.add_argument("--suite", default="pr")
    parser.add_argument("--kernel", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64])
    parser.add_argument("--patience", type=float, default=300.0, help="seconds to wait for a quiet machine")
    parser.add_argument("--json", type=Path, help="write the record here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = load_suite(arguments.suite).tasks
    runtime = open_runtime(arguments.model, "cpu", "auto", arguments.kernel)
    ours = timed(lambda: run_tasks(runtime, tasks))  # imports and caches of both sides are warm after this
    cpu = {}
    for size in arguments.batch_sizes:
        lm = hf(arguments.model, size)
        _, cpu[size], samples = timed(lambda lm=lm: run_hf(lm, tasks))
        print(f"hf, batch {size}: {cpu[size]:.1f} CPU s", file=sys.stderr, flush=True)
    difference = worst_difference(ours[2], samples)
    best = min(cpu, key=lambda size: cpu[size])
    lm = hf(arguments.model, best)
    rounds = []
    for number in range(arguments.rounds):
        busy = machine.wait_until_quiet(arguments.patience)
        sides = {"ours": lambda: run_tasks(runtime, tasks), "hf": lambda: run_hf(lm, tasks)}
        order = ("ours", "hf") if number % 2 == 0 else ("hf", "ours")
        pair = {name: timed(sides[name])[:2] for name in order}
        rounds.append({"busy_cores_before": busy, **{name: [round(t, 3) for t in pair[name]] for name in pair}})
        print(f"round {number + 1}: {json.dumps(rounds[-1])}", file=sys.stderr, flush=True)
    summary = {
        "wall": spread([entry["hf"][0] / entry["ours"][0] for entry in rounds]),
        "cpu": spread([entry["hf"][1] / entry["ours"][1] for entry in rounds]),
    }
    print("| time | ours, s | lm-eval hf, s | ratio | spread |\n|---|---|---|---|---|")
    for place, name in enumerate(("wall", "cpu")):
        mine, other = (statistics.median(entry[side][place] for entry in rounds) for side in ("ours", "hf"))
        row = summary[name]
        print(
            f"| {name} | {mine:.1f} | {other:.1f} | {row['ratio']:.2f} | {row['least']:.2f} to {row['greatest']:.2f} |"
        )
    print(f"hf batch size {best}; largest relative difference of a log-likelihood {difference:.1e}")
    if arguments.json:
        record = {
            "machine": machine.facts(),
            "versions": machine.versions("compress", "lm-eval", "torch", "transformers"),
            "suite": arguments.suite,
            "kernel": f"{runtime.name}, {runtime.kernel}",
            "items": {task.name: len(task.items) for task in ours[2]},
            "threads": arguments.threads,
            "hf_cpu_seconds_by_batch_size": {str(size): round(value, 2) for size, value in cpu.items()},
            "hf_batch_size": best,
            "largest_relative_difference": difference,
            "summary": summary,
            "rounds": rounds,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

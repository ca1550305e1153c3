"""Distillation against its alternatives: what a width cut, its repair, adapters, all weights, plain fine-tuning and the
same shape from scratch leave of the KL to the parent, at the same steps, tokens and text.

    python -m benchmarks.distill --shared ../shared --steps 400 --json benchmarks/results/distill-400.json

Makes what is missing under `--work` and scores everything on the same held-out windows, which are of other books than
the training text. Minutes are processor time of the whole command, because machines are shared. Prints Markdown: means
with 95% intervals, and what distillation of all weights leaves over what each other way leaves, paired.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks import cases
from benchmarks.distill_ways import DISTILLED, LOSSES, WAYS, Way
from benchmarks.intervals import Estimate, mean_per_token, ratio
from benchmarks.scored import scores
from benchmarks.scoring import BlockSums
from benchmarks.workspace import Workspace

KEEP = 0.75


def _command(*words: object) -> float:
    """Runs the command line; returns the seconds of processor time that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    program = Path(sys.executable).with_name("compress")
    subprocess.run([program, *map(str, words), "--no-eval", "--quiet"], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _start(kind: str, parent: Path, work: Path) -> Path:
    """The student before it learns: cut, repaired, or random weights of the repaired one's shape."""
    path = work / kind
    if path.exists():
        return path
    if kind != "scratch":
        repair = [] if kind == "repaired" else ["--no-repair"]
        _command("prune", parent, "--method", "width", "--keep", KEEP, *repair, "--output", path)
        return path
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = _start("repaired", parent, work)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(shape), dtype=torch.bfloat16)
    model.save_pretrained(path)
    for file in shape.glob("tokenizer*"):
        shutil.copy(file, path)
    return path


def _made(way: Way, parent: Path, work: Path, steps: int) -> tuple[Path, dict[str, float]]:
    """The model of one way, and what making it took."""
    start = _start(way.start, parent, work)
    if way.options is None:
        return start, {}
    folder = work / "".join(mark for mark in way.name.replace(" ", "-") if mark not in ",`':")
    notes = folder / "took.json"
    if not notes.exists():
        folder.mkdir(parents=True, exist_ok=True)
        stage = {"kind": "distill", "teacher": str(parent), "steps": steps, "patience": steps, **way.options}
        (folder / "recipe.yaml").write_text(json.dumps({"version": 1, "model": str(start), "stages": [stage]}))
        seconds = _command("run", folder / "recipe.yaml", "--output", folder / "artifact")
        learned = json.loads((folder / "artifact" / "training.json").read_text())
        took = {"processor_minutes": seconds / 60, "tokens": learned["done"] * learned["tokens_per_step"]}
        kl = {"held_out_kl_start": learned["held_out"][0]["kl"], "held_out_kl_kept": learned["written_kl"]}
        kl["held_out_kl_last"] = learned["held_out"][-1]["kl"]
        notes.write_text(json.dumps(took | kl))
    return folder / "artifact", json.loads(notes.read_text())


def _kl(sums: BlockSums) -> Estimate:
    return mean_per_token(sums.kl, sums.tokens)


def _ratios(sums: dict[str, BlockSums]) -> dict[str, Estimate]:
    """What distillation of all weights leaves over what each other way leaves, by the other's name."""
    if DISTILLED not in sums:
        return {}
    others = [name for name in sums if name not in ("base", DISTILLED)]
    return {name: ratio(sums[DISTILLED].kl, sums[name].kl) for name in others}


def _table(sums: dict[str, BlockSums], took: dict[str, dict[str, float]]) -> str:
    lines = [
        "| | KL to the parent | distilled / this | perplexity | tokens learned | processor minutes | held-out KL |",
        "|---|---|---|---|---|---|---|",
    ]
    lines.append(f"| the parent | 0 | | {sums['base'].perplexity:.2f} | | | |")
    ratios = _ratios(sums)
    for name, cost in took.items():
        each = sums[name]
        effort = " | | "
        if cost:
            held = ", ".join(f"{cost[f'held_out_kl_{when}']:.4f}" for when in ("start", "kept", "last"))
            effort = f"{cost['tokens']:,.0f} | {cost['processor_minutes']:.1f} | {held}"
        against = ratios[name].text(3) if name in ratios else ""
        lines.append(f"| {name} | {_kl(each).text(4)} | {against} | {each.perplexity:.2f} | {effort} |")
    return "\n".join(lines)


def _record(sums: dict[str, BlockSums]) -> dict[str, object]:
    """The scores and ratios, as they are kept."""
    rows = {name: {"kl": asdict(_kl(each)), "perplexity": each.perplexity} for name, each in sums.items()}
    ratios = {name: asdict(each) for name, each in _ratios(sums).items()}
    return {"scores": rows, "distilled_over_other": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="directory with data/ and models/")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"), help="artifacts and tokens")
    parser.add_argument("--model", choices=tuple(cases.MODELS), default="packaged")
    parser.add_argument("--losses", action="store_true", help="rows of every loss in place of the ways to learn")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--eval-tokens", type=int, default=cases.EVAL_TOKENS)
    parser.add_argument("--make", type=int, nargs="*", help="only make these rows, counted from 0, and score nothing")
    parser.add_argument("--rows", type=int, nargs="*", help="only these rows, counted from 0")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    arguments = parser.parse_args()
    workspace = Workspace(arguments.work, arguments.shared, None, threads=1)
    parent = workspace.model_dir(arguments.model)
    work = arguments.work / "distill" / f"{arguments.model}-{arguments.steps}"
    work.mkdir(parents=True, exist_ok=True)
    every = LOSSES if arguments.losses else WAYS
    chosen = arguments.rows if arguments.make is None else arguments.make
    rows = every if chosen is None else [every[number] for number in chosen]
    made = {way.name: _made(way, parent, work, arguments.steps) for way in rows}
    if arguments.make is not None:
        return
    paths = {"base": parent} | {name: path for name, (path, _) in made.items()}
    sums = scores(workspace, arguments.model, paths, arguments.eval_tokens)
    took = {name: cost for name, (_, cost) in made.items()}
    print(_table(sums, took))
    if arguments.json is not None:
        record = {"model": arguments.model, "steps": arguments.steps, "tokens": arguments.eval_tokens}
        arguments.json.write_text(json.dumps({**record, **_record(sums), "took": took}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Quality of compress against llm-compressor: KL to the unquantised model on held-out text, both tools, same samples.

    PEER_LLMC_PYTHON=<python with llmcompressor 0.14> python -m benchmarks.quality --shared ../shared

Makes what is missing (artifacts of both tools for every model, scheme, method and calibration seed of cases.py), scores
everything on the same held-out windows, and prints the table as Markdown. `--json FILE` keeps all numbers with the
hashes of the models they were measured on; rows that a run with fewer models, variants or tools does not make again
stay there, each with its date. `--tool peer` makes and scores only llm-compressor's side.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks import cases, machine
from benchmarks.quality_table import Measured, Row, merged, render, rows
from benchmarks.scored import scores
from benchmarks.scoring import BlockSums
from benchmarks.workspace import Run, Workspace


def planned_runs(
    models: list[str], variants: list[str], tools: list[str], seeds: list[int], bits: list[int]
) -> list[Run]:
    """Every run of the frozen matrix that the options keep; round-to-nearest has no seed and runs once."""
    return [
        Run(tool, model, variant, width, group, seed)
        for model in models
        for width, group in cases.MODELS[model].schemes
        if width in bits
        for variant in variants
        for tool in tools
        if tool == "ours" or cases.VARIANTS[variant].peer
        for seed in (seeds if cases.VARIANTS[variant].method != "rtn" else seeds[:1])
    ]


def score_runs(workspace: Workspace, runs: list[Run], eval_tokens: int) -> dict[Run, BlockSums]:
    """The sums of every run, those of one model scored together."""
    results: dict[Run, BlockSums] = {}
    for model in dict.fromkeys(run.model for run in runs):
        wanted = {run.folder: run for run in runs if run.model == model}
        found = scores(
            workspace, model, {folder: workspace.artifact(run) for folder, run in wanted.items()}, eval_tokens
        )
        results.update({run: found[folder] for folder, run in wanted.items()})
    return results


def stored_bits(artifact: Path) -> float:
    """Bits stored per weight of the quantised linears: packed codes, scales and zero points over weights."""
    from safetensors import safe_open

    stored = weights = 0
    for shard in sorted(artifact.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                if name.endswith(("weight_packed", "weight_scale", "weight_zero_point")):
                    tensor = handle.get_tensor(name)
                    stored += 8 * tensor.numel() * tensor.element_size()
                elif name.endswith("weight_shape"):
                    weights += int(np.prod(handle.get_tensor(name).tolist()))
    return stored / weights


def recorded(path: Path, facts: Row, models: dict[str, str], table: list[Row]) -> Row:
    """The record in `path` with these rows in place of its own of the same name, every row with its date.

    Raises:
        SystemExit: the record is of other weights, or of other tokens, than `facts` and `models` say.
    """
    earlier: Row = json.loads(path.read_text()) if path.exists() else {"models": {}, "rows": []}
    same = ("eval_tokens", "calibration")
    other = [name for name in same if earlier["rows"] and earlier[name] != facts[name]]
    other += [name for name in models if earlier["models"].get(name, models[name]) != models[name]]
    if other:
        raise SystemExit(f"error: {path} has other {', '.join(other)}\nhint: write another file, or measure all of it")
    for row in earlier["rows"]:
        row.setdefault("date", earlier["machine"]["date"])
    table = [{**row, "date": facts["machine"]["date"]} for row in table]
    return {**facts, "models": earlier["models"] | models, "rows": merged(earlier["rows"], table)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="directory with data/ and models/")
    parser.add_argument(
        "--work", type=Path, default=Path("build/benchmarks"), help="artifacts, tokens and cached scores"
    )
    parser.add_argument("--peer-python", type=Path, default=os.environ.get("PEER_LLMC_PYTHON"))
    parser.add_argument("--tool", choices=("peer", "ours", "both"), default="both")
    parser.add_argument("--models", nargs="+", choices=tuple(cases.MODELS), default=list(cases.MODELS))
    parser.add_argument(
        "--extra", nargs="+", default=[], metavar="NAME=DIR", help="other models of the tales corpus, W4 and W3 g128"
    )
    parser.add_argument("--variants", nargs="+", choices=tuple(cases.VARIANTS), default=list(cases.USUAL))
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(cases.SEEDS))
    parser.add_argument("--eval-tokens", type=int, default=cases.EVAL_TOKENS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--any-version", action="store_true", help="take our artifacts made by other versions as well")
    parser.add_argument("--make-only", action="store_true", help="make the artifacts, score nothing")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    arguments = parser.parse_args()

    for name, directory in (extra.split("=", 1) for extra in arguments.extra):
        cases.MODELS[name] = cases.Model(f"path:{directory}", "tales", ((4, 128), (3, 128)))
        arguments.models.append(name)
    torch.set_num_threads(arguments.threads)
    peer_python = Path(arguments.peer_python) if arguments.peer_python else None
    workspace = Workspace(
        arguments.work.resolve(), arguments.shared.resolve(), peer_python, arguments.threads, arguments.any_version
    )
    tools = ["peer", "ours"] if arguments.tool == "both" else [arguments.tool]
    runs = planned_runs(arguments.models, arguments.variants, tools, arguments.seeds, arguments.bits)
    for number, run in enumerate(runs, 1):
        print(f"[{number}/{len(runs)}] {run.folder}", file=sys.stderr)
        workspace.artifact(run)
    if arguments.make_only:
        return
    scored = score_runs(workspace, runs, arguments.eval_tokens)
    measured = {run: Measured(sums, stored_bits(workspace.artifact(run))) for run, sums in scored.items()}
    table = rows(measured)
    if arguments.json:
        facts: Row = {
            "machine": machine.facts(),
            "versions": machine.versions("compress", "torch", "transformers", "compressed-tensors"),
            "eval_tokens": arguments.eval_tokens,
            "calibration": {"samples": cases.SAMPLES, "seq_len": cases.SEQ_LEN, "seeds": arguments.seeds},
        }
        models = {name: workspace.digest(workspace.model_dir(name)) for name in arguments.models}
        record = recorded(arguments.json, facts, models, table)
        table = record["rows"]
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    print(render(table))


if __name__ == "__main__":
    main()

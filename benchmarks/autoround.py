"""Our best recipe of each bit width against AutoRound: KL to the unquantised model on the same held-out text, and time.

    PEER_AUTOROUND_PYTHON=<python with auto-round 0.16.1> python -m benchmarks.autoround --shared ../shared \
        --json benchmarks/results/autoround.json
    ... python -m benchmarks.autoround --shared ../shared --time 3 --json benchmarks/results/autoround.json

The first command makes what is missing of both tools (recipes/gptq-w4-g128-refined.yaml and its like, with the group
size of the case; AutoRound with its 200 iterations in batches of 8), on the same token files, and scores all of it. The
second only times, alternating, fresh runs that are thrown away, and leaves the scores in the record as they are.
`--peer-runs DIR` takes over runs of peer_autoround.py that lie there as ar-w4-g128-s0/{artifact,result.json}.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks import cases, machine
from benchmarks.intervals import mean_per_token, ratio
from benchmarks.scored import scores
from benchmarks.scoring import BlockSums
from benchmarks.workspace import ROOT, Workspace, file_digest

MODEL = "tales-6m"
BARS = {"kl": 0.85, "time": 0.6}
"""What ours may have at most of AutoRound's."""


@dataclass(frozen=True)
class Case:
    """One comparison, calibrated on the windows of one seed."""

    bits: int
    group: int
    seed: int

    @property
    def name(self) -> str:
        return f"w{self.bits}-g{self.group}-s{self.seed}"


@dataclass(frozen=True)
class Tools:
    """Where the two tools and their runs are."""

    workspace: Workspace
    peer_python: str | None
    peer_runs: Path | None
    threads: int

    def made(self, case: Case, tool: str) -> Path:
        """The folder of a finished run, with `artifact` and `result.json`; made now if it is not there."""
        if tool == "auto-round" and self.peer_runs is not None:
            taken = self.peer_runs / f"ar-{case.name}"
            if (taken / "result.json").exists():
                return taken
        folder = self.workspace.path / "autoround" / f"{tool}-{case.name}"
        identity = self._identity(case, tool)
        record = folder / "result.json"
        if record.exists() and json.loads(record.read_text()).get("identity") == identity:
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        result = self.run(case, tool, folder)
        record.write_text(json.dumps({**result, "identity": identity}, indent=2) + "\n")
        return folder

    def run(self, case: Case, tool: str, folder: Path) -> dict[str, Any]:
        """One run into `folder/artifact`: seconds of the whole process, and of the algorithm as the tool says."""
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            environment[name] = str(self.threads)
        child = machine.run(self._command(case, tool, folder), environment)
        if child.returncode != 0:
            raise SystemExit(f"error: {tool} {case.name} ended with {child.returncode}:\n{child.stderr[-3000:]}")
        said = json.loads(child.stdout if tool == "compress" else child.stdout.strip().splitlines()[-1])
        return {
            "algorithm_wall_seconds": round(said["seconds" if tool == "compress" else "wall_seconds"], 2),
            "process_wall_seconds": round(child.seconds, 2),
            "process_processor_seconds": round(child.cpu_seconds, 2),
            "others_busy_cores": round(child.others_busy_cores, 3),
        }

    def _command(self, case: Case, tool: str, folder: Path) -> list[str]:
        model, artifact = str(self.workspace.model_dir(MODEL)), str(folder / "artifact")
        if tool == "compress":
            recipe = folder / "recipe.yaml"
            recipe.write_text(json.dumps(self._recipe(case)))
            program = str(Path(sys.executable).with_name("compress"))
            return [program, "run", str(recipe), "--model", model, "--output", artifact, "--no-eval", "--json"]
        if self.peer_python is None:
            raise SystemExit("error: AutoRound's Python is unknown: set PEER_AUTOROUND_PYTHON or --peer-python")
        return [
            *(self.peer_python, str(ROOT / "benchmarks" / "peer_autoround.py"), "--model", model),
            *("--bits", str(case.bits), "--group-size", str(case.group), "--threads", str(self.threads)),
            *("--calib-tokens", str(self.workspace.calibration(MODEL, case.seed)), "--output", artifact),
        ]

    def _recipe(self, case: Case) -> dict[str, Any]:
        """The frozen recipe of this bit width, with the group size and the tokens of the case."""
        recipe: dict[str, Any] = yaml.safe_load((ROOT / "recipes" / f"gptq-w{case.bits}-g128-refined.yaml").read_text())
        (stage,) = recipe["stages"]
        stage["scheme"]["group_size"] = case.group
        source = str(self.workspace.calibration(MODEL, case.seed))
        stage["calibration"] |= {"source": source, "samples": cases.SAMPLES, "seq_len": cases.SEQ_LEN}
        return {**recipe, "seed": case.seed}

    def _identity(self, case: Case, tool: str) -> dict[str, Any]:
        found: dict[str, Any] = {
            "model": self.workspace.digest(self.workspace.model_dir(MODEL)),
            "tokens": file_digest([self.workspace.calibration(MODEL, case.seed)]),
        }
        if tool == "compress":
            recipe = self._recipe(case)
            recipe["stages"][0]["calibration"]["source"] = case.seed
            found["recipe"] = recipe
        return found


def scored(tools: Tools, case: Case, eval_tokens: int) -> dict[str, BlockSums]:
    """Scores of both tools' artifacts, by tool."""
    artifacts = {tool: tools.made(case, tool) / "artifact" for tool in ("compress", "auto-round")}
    return scores(tools.workspace, MODEL, artifacts, eval_tokens)


def quality(tools: Tools, wanted: list[Case], eval_tokens: int) -> list[dict[str, Any]]:
    """One row per bits and group, seeds averaged per block; a case with a run that cannot be made is left out."""
    rows = []
    for bits, group in dict.fromkeys((case.bits, case.group) for case in wanted):
        seeds = [case for case in wanted if (case.bits, case.group) == (bits, group)]
        found = [scored(tools, case, eval_tokens) for case in seeds]
        ours, theirs = (np.mean([each[tool].kl for each in found], axis=0) for tool in ("compress", "auto-round"))
        runs = {
            tool: [json.loads((tools.made(case, tool) / "result.json").read_text()) for case in seeds]
            for tool in ("compress", "auto-round")
        }
        rows.append(
            {
                "bits": bits,
                "group": group,
                "seeds": [case.seed for case in seeds],
                "compress": asdict(mean_per_token(ours, found[0]["compress"].tokens)),
                "auto-round": asdict(mean_per_token(theirs, found[0]["compress"].tokens)),
                "ratio": asdict(ratio(ours, theirs)),
                "ratio_per_seed": [each["compress"].mean_kl / each["auto-round"].mean_kl for each in found],
                "top1": {t: float(np.mean([e[t].agreement for e in found])) for t in ("compress", "auto-round")},
                "processor_seconds": {tool: statistics.median(map(_processor, each)) for tool, each in runs.items()},
            }
        )
        print(quality_line(rows[-1]), flush=True)
    return rows


def together(earlier: list[dict[str, Any]], measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of an earlier record and those measured now, which replace the ones of their bits and group."""
    rows = {(row["bits"], row["group"]): row for row in (*earlier, *measured)}
    return [rows[case] for case in sorted(rows, reverse=True)]


def _processor(result: dict[str, Any]) -> float:
    """Processor seconds of a run: of the process, or where a run was taken over, of its tuning alone, which is less."""
    return float(result.get("process_processor_seconds", result.get("processor_seconds")))


def quality_line(row: dict[str, Any]) -> str:
    ours, theirs, share = (row[key] for key in ("compress", "auto-round", "ratio"))
    seconds = row["processor_seconds"]
    return (
        f"| {row['bits']} | {row['group']} | {ours['value']:.5f} | {theirs['value']:.5f} "
        f"| {share['value']:.3f} [{share['low']:.3f}, {share['high']:.3f}] "
        f"| {seconds['compress']:.0f} | {seconds['auto-round']:.0f} "
        f"| {seconds['compress'] / seconds['auto-round']:.2f} |"
    )


def timed(tools: Tools, wanted: list[Case], repeats: int, patience: float) -> list[dict[str, Any]]:
    """Alternating runs of both tools on the first seed of each case, each into a directory that is thrown away."""
    rows = []
    for bits, group in dict.fromkeys((case.bits, case.group) for case in wanted):
        case = next(case for case in wanted if (case.bits, case.group) == (bits, group))
        pairs = []
        for repeat in range(repeats):
            order = ("compress", "auto-round") if repeat % 2 == 0 else ("auto-round", "compress")
            pair = {}
            for tool in order:
                machine.wait_until_quiet(patience)
                with tempfile.TemporaryDirectory(dir=tools.workspace.path) as folder:
                    pair[tool] = tools.run(case, tool, Path(folder))
            pairs.append(pair)
        keys = ("algorithm_wall_seconds", "process_wall_seconds", "process_processor_seconds")
        shares = {key: [pair["compress"][key] / pair["auto-round"][key] for pair in pairs] for key in keys}
        medians = {key: statistics.median(each) for key, each in shares.items()}
        rows.append({"bits": bits, "group": group, "ratio": medians, "ratios": shares, "pairs": pairs})
        print(f"W{bits} g{group}: time ours / theirs {medians}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="directory with data/ and models/")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"), help="runs, tokens and cached scores")
    parser.add_argument("--peer-python", default=os.environ.get("PEER_AUTOROUND_PYTHON"))
    parser.add_argument("--peer-runs", type=Path, help="finished runs of AutoRound")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--groups", nargs="+", type=int, default=[128, 64])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(cases.SEEDS))
    parser.add_argument("--eval-tokens", type=int, default=cases.EVAL_TOKENS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--time", type=int, metavar="N", help="time N alternating pairs of each case, score nothing")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds to wait for a quiet machine")
    parser.add_argument("--json", type=Path, help="write the record here; other cases and times there stay")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    workspace = Workspace(arguments.work.resolve(), arguments.shared.resolve(), None, arguments.threads)
    workspace.path.mkdir(parents=True, exist_ok=True)
    tools = Tools(workspace, arguments.peer_python, arguments.peer_runs, arguments.threads)
    wanted = [Case(b, g, s) for b in arguments.bits for g in arguments.groups for s in arguments.seeds]
    if arguments.time:
        found = {"time": timed(tools, wanted, arguments.time, arguments.patience)}
    else:
        print("| bits | group | KL ours | KL AutoRound | ratio | processor s, ours | AutoRound | ratio |")
        print("|---|---|---|---|---|---|---|---|")
        found = {"quality": quality(tools, wanted, arguments.eval_tokens)}
    if arguments.json:
        record = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        for kind, measured in found.items():
            found[kind] = together(record.get(kind, []), measured)
        record |= {
            "model": workspace.digest(workspace.model_dir(MODEL)),
            "bars": BARS,
            **{f"{name}_machine": machine.facts() | {"threads": arguments.threads} for name in found},
            **{f"{name}_versions": machine.versions("compress", "torch", "transformers") for name in found},
            **found,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Quality of pruning: KL to the dense model on held-out text, llm-compressor's SparseGPT and Wanda on the same samples.

    PEER_LLMC_PYTHON=<python with llmcompressor 0.14> python -m benchmarks.pruning --shared ../shared

Makes what is missing, scores everything on the same held-out windows and prints Markdown; without PEER_LLMC_PYTHON ours
alone. With `--seeds 0 1 2` the methods that `SEEDED` names are calibrated on the windows of every seed and their KL is
averaged block by block; all others take the first. `--json FILE` keeps the numbers. Artifacts are made again only where
their folder under `--work` is removed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks import cases
from benchmarks.intervals import Estimate, mean_per_token, ratio
from benchmarks.scored import scores
from benchmarks.scoring import BlockSums
from benchmarks.workspace import ROOT, Workspace
from compress import pipeline
from compress.recipe import parse_recipe


@dataclass(frozen=True)
class Variant:
    """One row: how we are asked for it (settings of the method, amount, more of the stage) and llm-compressor's name of
    it, if any."""

    name: str
    amount: str
    method: dict[str, object]
    peer: str | None = None
    stage: dict[str, object] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.amount.replace(':', 'of')}".replace(" ", "-").replace("/", "of")

    def seeds(self, wanted: Sequence[int]) -> Sequence[int]:
        """The calibration seeds that it is measured with."""
        return wanted if self.name in SEEDED else wanted[:1]


@dataclass(frozen=True)
class Row:
    """A variant with the names of its artifacts, one for each seed: ours, and llm-compressor's of the same windows."""

    variant: Variant
    ours: list[str]
    peer: list[str]


SEEDED = ("wanda", "ria", "sparsegpt")


def _masks() -> list[Variant]:
    rows = []
    for amount in ("50%", "2:4"):
        rows += [
            Variant("magnitude", amount, {"kind": "magnitude"}),
            Variant("wanda", amount, {"kind": "wanda"}, "wanda"),
            Variant("wanda, norms linear by linear", amount, {"kind": "wanda", "norms": "linear"}),
            Variant("wanda, root of the norms", amount, {"kind": "wanda", "exponent": 0.5}),
            Variant("ria", amount, {"kind": "ria"}),
            Variant("ria, norms linear by linear", amount, {"kind": "ria", "norms": "linear"}),
            Variant("sparsegpt, the paper's", amount, {"kind": "sparsegpt", "refit_steps": 0, "correction": 0.0}),
            Variant("sparsegpt", amount, {"kind": "sparsegpt"}, "sparsegpt"),
        ]
    rows.insert(1, Variant("magnitude within rows", "50%", {"kind": "wanda", "exponent": 0.0}))
    rows.insert(2, Variant("wanda over the matrix", "50%", {"kind": "wanda", "scope": "matrix"}))
    for kind in ("wanda", "sparsegpt"):
        for allocation in ("owl", "alphapruning"):
            name = f"{kind}, {allocation}"
            rows.append(Variant(name, "50%", {"kind": kind}, stage={"allocation": allocation}))
    return rows


def _widths() -> list[Variant]:
    settings: dict[str, dict[str, object]] = {
        "width": {},
        "width by activation": {"importance": "activation"},
        "width by feature": {"importance": "feature"},
        "width by taylor": {"importance": "taylor"},
        "width by logits": {"importance": "logits"},
        "width, half the heads": {"heads": 0.5},
        "width, 7/8 of the stream": {"hidden": 0.875},
    }
    rows = []
    for name, setting in settings.items():
        rows += [
            Variant(f"{name}, no repair", "keep 0.75", {"kind": "width", **setting, "repair": False}),
            Variant(name, "keep 0.75", {"kind": "width", **setting}),
        ]
    return rows


VARIANTS = (*_masks(), *_widths())


def _amount(variant: Variant) -> dict[str, object]:
    if variant.amount.startswith("keep"):
        return {"keep": float(variant.amount.split()[1])}
    return {"pattern": variant.amount} if ":" in variant.amount else {"sparsity": float(variant.amount[:-1]) / 100}


def _ours(workspace: Workspace, model: str, variant: Variant, seed: int) -> Path:
    """Our artifact."""
    output = workspace.path / "pruning" / model / f"ours-{variant.folder}-s{seed}"
    if not output.exists():
        stage: dict[str, object] = {"kind": "prune", "method": variant.method, **_amount(variant), **variant.stage}
        if variant.method["kind"] != "magnitude":
            source = str(workspace.calibration(model, seed).resolve())
            stage["calibration"] = {"source": source, "samples": cases.SAMPLES, "seq_len": cases.SEQ_LEN}
        print(output.name, file=sys.stderr)
        pipeline.run(parse_recipe({"version": 1, "stages": [stage]}), model=workspace.model_dir(model), output=output)
    return output


def _peers(workspace: Workspace, model: str, wanted: list[tuple[Variant, int]]) -> list[Path]:
    """llm-compressor's checkpoints of the same, made in one process."""
    outputs, jobs = [], []
    for variant, seed in wanted:
        output = workspace.path / "pruning" / model / f"peer-{variant.folder}-s{seed}"
        outputs.append(output)
        if not (output / "config.json").exists():
            pattern = {"mask_structure": variant.amount} if ":" in variant.amount else {}
            tokens = str(workspace.calibration(model, seed))
            job = {"method": variant.peer, "calib_tokens": tokens, "output": str(output)}
            jobs.append({**job, "settings": {"sparsity": 0.5, **pattern}})
    if jobs:
        script = [str(workspace.peer_python), str(ROOT / "benchmarks" / "peer_sparse.py")]
        words = ["--model", str(workspace.model_dir(model)), "--jobs", json.dumps(jobs)]
        subprocess.run([*script, *words], check=True, stdout=subprocess.DEVNULL)
    return outputs


def _kl(sums: BlockSums) -> Estimate:
    return mean_per_token(sums.kl, sums.tokens)


def _averaged(sums: Sequence[BlockSums]) -> BlockSums:
    """The mean over calibration seeds, block by block."""
    columns = ("tokens", "nll", "kl", "top1")
    return BlockSums(**{name: np.mean([getattr(each, name) for each in sums], axis=0) for name in columns})


def _table(dense: BlockSums, rows: list[tuple[Variant, BlockSums, BlockSums | None]]) -> str:
    lines = [
        "| amount | method | perplexity | KL to base | llm-compressor's KL | ours / theirs |",
        "|---|---|---|---|---|---|",
    ]
    lines.append(f"| dense | | {dense.perplexity:.3f} | 0 | | |")
    for variant, mine, peer in rows:
        theirs = f"{_kl(peer).text(4)} | {ratio(mine.kl, peer.kl).text(3)}" if peer is not None else " | "
        lines.append(f"| {variant.amount} | {variant.name} | {mine.perplexity:.3f} | {_kl(mine).text(4)} | {theirs} |")
    return "\n".join(lines)


def _row(sums: Sequence[BlockSums]) -> dict[str, object]:
    mean = _averaged(sums)
    kl = _kl(mean)
    seeds = [each.mean_kl for each in sums]
    return {"kl": kl.value, "kl_low": kl.low, "kl_high": kl.high, "perplexity": mean.perplexity, "kl_per_seed": seeds}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="directory with data/ and models/")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"), help="artifacts and tokens")
    parser.add_argument("--peer-python", type=Path, default=os.environ.get("PEER_LLMC_PYTHON"))
    parser.add_argument("--model", choices=tuple(cases.MODELS), default="packaged")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the calibration windows")
    amounts = sorted({variant.amount for variant in VARIANTS})
    parser.add_argument("--amount", action="append", choices=amounts, help="leave out all others; repeatable")
    every = sorted({variant.name for variant in VARIANTS})
    parser.add_argument("--variant", action="append", choices=every, help="leave out all others; repeatable")
    parser.add_argument("--eval-tokens", type=int, default=cases.EVAL_TOKENS)
    parser.add_argument("--make-only", action="store_true", help="make the artifacts, score nothing")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    workspace = Workspace(arguments.work, arguments.shared, arguments.peer_python, threads=1)
    wanted = [each for each in VARIANTS if not arguments.amount or each.amount in arguments.amount]
    wanted = [each for each in wanted if not arguments.variant or each.name in arguments.variant]
    candidates: dict[str, Path] = {}
    rows = []
    theirs: dict[str, tuple[Variant, int]] = {}
    for variant in wanted:
        row = Row(variant, [], [])
        rows.append(row)
        for seed in variant.seeds(arguments.seeds):
            row.ours.append(f"ours {variant.folder} {seed}")
            candidates[row.ours[-1]] = _ours(workspace, arguments.model, variant, seed)
            if variant.peer is not None and arguments.peer_python is not None:
                row.peer.append(f"peer {variant.folder} {seed}")
                theirs[row.peer[-1]] = variant, seed
    candidates |= zip(theirs, _peers(workspace, arguments.model, list(theirs.values())), strict=True)
    if arguments.make_only:
        return
    dense = {"base": workspace.model_dir(arguments.model)}
    sums = scores(workspace, arguments.model, dense | candidates, arguments.eval_tokens)
    found = [(row.variant, [sums[name] for name in row.ours], [sums[name] for name in row.peer]) for row in rows]
    means = [(variant, _averaged(ours), _averaged(peer) if peer else None) for variant, ours, peer in found]
    print(_table(sums["base"], means))
    if arguments.json is not None:
        both = {f"ours {variant.folder}": ours for variant, ours, _ in found}
        both |= {f"peer {variant.folder}": peer for variant, _, peer in found if peer}
        record: dict[str, object] = {
            "model": arguments.model,
            "seeds": arguments.seeds,
            "tokens": arguments.eval_tokens,
            "scores": {"base": _row([sums["base"]]), **{name: _row(each) for name, each in both.items()}},
            "ratios": {f"ours {v.folder}": asdict(ratio(mine.kl, peer.kl)) for v, mine, peer in means if peer},
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

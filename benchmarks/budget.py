"""Mixed precision under a budget against one scheme for all, and against 8 bits for the first and last blocks.

    python -m benchmarks.budget --shared ../shared --json benchmarks/results/budget.json

For every budget: what `compress quantize --target-bits` makes; the uniform schemes that fit it, of each code width the
one with the finest groups, symmetric and asymmetric; and the naive recipe, 8 bits in the first and last block and the
most bits that fit elsewhere. All by GPTQ on the same calibration windows, scored together on held-out text. Runs that
are complete are taken up. `--models NAME` takes others of cases.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, machine
from benchmarks.intervals import mean_per_token, ratio
from benchmarks.scored import scores
from benchmarks.scoring import BlockSums
from benchmarks.workspace import Workspace
from compress.types import IntScheme

BUDGETS = (2.5, 3.0, 3.5, 4.25, 5.0)
SCALE_BITS = 16
GROUP_SIZES = (16, 32, 64, 128)
SAMPLES = 64
Row = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """One artifact: what kind of recipe made it, its name, and the `compress` arguments that make it."""

    kind: str
    name: str
    arguments: tuple[str, ...]


def uniform(budget: float, width: int) -> Iterator[Candidate]:
    """For each code width and symmetry the scheme of most bits that fits. width: inputs of the narrowest linear."""
    for bits in (2, 3, 4, 5, 6, 8):
        for symmetric in (True, False):
            schemes = [IntScheme(bits, size, symmetric) for size in GROUP_SIZES]
            fitting = [scheme for scheme in schemes if scheme.bits_per_weight(width, SCALE_BITS) <= budget]
            if fitting and bits + 1.2 > budget:  # a bit less would be far behind
                best = max(fitting, key=lambda scheme: scheme.bits_per_weight(width, SCALE_BITS))
                flags = ("--bits", str(bits), "--group-size", str(best.group_size), "--sym" if symmetric else "--asym")
                yield Candidate("uniform", best.label, ("quantize", *flags))


def naive(budget: float, shares: list[float], folder: Path) -> Iterator[Candidate]:
    """8 bits in the first and last block, the most bits that fit elsewhere. shares: of the weights, by block."""
    ends = shares[0] + shares[-1]
    for bits in (6, 5, 4, 3, 2):
        if ends * 8.125 + (1 - ends) * (bits + 0.125) <= budget:
            names = [f"re:.*\\.{block}\\." for block in (0, len(shares) - 1)]
            stage = {
                "kind": "quantize",
                "method": "gptq",
                "scheme": {"bits": bits, "group_size": 128},
                "overrides": [{"linears": names, "scheme": {"bits": 8, "group_size": 128}}],
                "calibration": {"source": "tales", "samples": SAMPLES, "seq_len": cases.SEQ_LEN},
            }
            recipe = folder / f"naive-{bits}.yaml"
            recipe.parent.mkdir(parents=True, exist_ok=True)
            recipe.write_text(json.dumps({"version": 1, "stages": [stage]}))
            yield Candidate("naive", f"8 bits at both ends, else w{bits}a16-g128", ("run", str(recipe)))
            return


def make(candidate: Candidate, model: Path, folder: Path, threads: int) -> Row:
    """Makes an artifact, or takes it up where it is complete; returns the command's document."""
    verb, *rest = candidate.arguments
    source = (
        [str(model), "--calib", "tales", "--samples", str(SAMPLES)] if verb == "quantize" else ["--model", str(model)]
    )
    method = ["--method", "gptq"] if verb == "quantize" else []
    output = folder / f"{candidate.kind}-{candidate.name.replace(' ', '-').replace(',', '')}"
    command = [str(Path(sys.executable).with_name("compress")), verb, *rest, *source, *method]
    done = subprocess.run(
        [*command, "--output", str(output), "--no-eval", "--json", "--quiet", "--threads", str(threads)],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{candidate.name} failed with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    document: Row = json.loads(done.stdout)
    return document


def block_shares(model: Path) -> tuple[list[float], int]:
    """Share of the linears' weights in each block, and the narrowest input."""
    from compress.models.checkpoint import Checkpoint
    from compress.models.skeleton import Skeleton

    linears = Skeleton(Checkpoint.open(model), torch.float32).linears()
    blocks = [0.0] * (1 + max(spec.block for spec in linears))
    for spec in linears:
        blocks[spec.block] += spec.in_features * spec.out_features
    return [weights / sum(blocks) for weights in blocks], min(spec.in_features for spec in linears)


def rows(made: dict[tuple[float, Candidate], Row], sums: dict[str, BlockSums]) -> list[Row]:
    """One row per budget and candidate; `ratio` is the searched artifact's KL over this one's, paired over blocks."""
    table = []
    for (budget, candidate), document in made.items():
        ours = next(c for b, c in made if b == budget and c.kind == "budget")
        mine = sums[f"{candidate.kind} {candidate.name}"]
        row: Row = {
            "budget": budget,
            "kind": candidate.kind,
            "name": candidate.name,
            "bits_per_weight": document["sizes"]["bits_per_weight"],
            "bytes": document["sizes"]["bytes"],
            "kl": asdict(mean_per_token(mine.kl, mine.tokens)),
            "perplexity": mine.perplexity,
        }
        if candidate.kind == "budget":
            row["predicted_kl"] = document["budget"]["chosen"]["predicted_kl"]
            row["kl_on_calibration_text"] = document["budget"]["chosen"]["measured_kl"]
        else:
            row["ratio"] = asdict(ratio(sums[f"budget {ours.name}"].kl, mine.kl))
        table.append(row)
    return table


def render(table: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| budget | recipe | stored bits/weight | KL to base | perplexity | KL of the search / this |"]
    lines.append("|---|---|---|---|---|---|")
    for row in table:
        kl, over = row["kl"], row.get("ratio")
        compared = "" if over is None else f"{over['value']:.3f} [{over['low']:.3f}, {over['high']:.3f}]"
        name = f"**--target-bits {row['budget']:g}**" if row["kind"] == "budget" else row["name"]
        lines.append(
            f"| {row['budget']:g} | {name} | {row['bits_per_weight']:.4f} | "
            f"{kl['value']:.5f} [{kl['low']:.5f}, {kl['high']:.5f}] | {row['perplexity']:.3f} | {compared} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="directory with data/ and models/")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"), help="artifacts")
    parser.add_argument("--model", choices=tuple(cases.MODELS), default="tales-6m")
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--eval-tokens", type=int, default=cases.EVAL_TOKENS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all numbers here")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    workspace = Workspace(arguments.work.resolve(), arguments.shared.resolve(), None, arguments.threads)
    model, folder = workspace.model_dir(arguments.model), workspace.path / "budget" / arguments.model
    shares, width = block_shares(model)
    made: dict[tuple[float, Candidate], Row] = {}
    for budget in arguments.budgets:
        flags = ("quantize", "--target-bits", f"{budget:g}")
        candidates = [
            Candidate("budget", f"{budget:g}", flags),
            *uniform(budget, width),
            *naive(budget, shares, folder),
        ]
        for candidate in candidates:
            print(f"{budget:g} bits: {candidate.kind} {candidate.name}", file=sys.stderr)
            made[budget, candidate] = make(candidate, model, folder, arguments.threads)
    artifacts = {f"{c.kind} {c.name}": Path(document["artifact"]) for (_, c), document in made.items()}
    sums = scores(workspace, arguments.model, artifacts, arguments.eval_tokens)
    table = rows(made, sums)
    print(render(table))
    if arguments.json:
        record: Row = {
            "machine": machine.facts(),
            "versions": machine.versions("compress", "torch", "transformers", "compressed-tensors", "scipy"),
            "eval_tokens": arguments.eval_tokens,
            "calibration": {"source": "tales", "samples": SAMPLES, "seq_len": cases.SEQ_LEN, "seed": 0},
            "model": {arguments.model: workspace.digest(model)},
            "rows": table,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

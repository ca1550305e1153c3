"""Schemes that round inputs too, beside llm-compressor's: the same samples, and both sides' artifacts run alike.

    PEER_LLMC_PYTHON=... python -m benchmarks.rounded_inputs --shared ../shared \
        --json benchmarks/results/rounded-inputs.json

Both sides' artifacts are loaded by transformers with compressed-tensors, which rounds inputs as the formats say, in
float32 otherwise. For every scheme each of ours is compared with the other tool's best of that scheme, and on the
outlier twin with what the twin adds to round to nearest: a model and its twin go together.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, machine
from benchmarks.intervals import Estimate, mean_per_token, outlier_recovery, ratio
from benchmarks.points import OURS, Measured, Point, measure
from benchmarks.scoring import load_rounding_inputs
from benchmarks.workspace import Workspace

PEER = "llm-compressor"
Row = dict[str, Any]


def _ours(scheme: str, name: str, method: str | dict[str, Any], text: bool) -> Point:
    stage = {"kind": "quantize", "method": method, "scheme": scheme}
    return Point(OURS, f"{scheme} {name}", text=text, recipe=json.dumps({"version": 1, "stages": [stage]}))


def _theirs(scheme: str, name: str, *arguments: str, text: bool, called: str | None = None) -> Point:
    return Point(PEER, f"{scheme} {name}", ("--scheme", called or scheme, *arguments), text)


POINTS: tuple[Point, ...] = (
    _ours("W8A8", "rtn", "rtn", text=False),
    _ours("W8A8", "gptq", "gptq", text=True),
    _ours("W8A8", "smoothquant", "smoothquant", text=True),
    _ours("W8A8", "smoothquant, gptq", {"kind": "smoothquant", "rounding": {"kind": "gptq"}}, text=True),
    _theirs("W8A8", "rtn", "--method", "rtn", text=False),
    _theirs("W8A8", "gptq", "--method", "gptq", text=True),
    _theirs("W8A8", "smoothquant 0.8", "--method", "rtn", "--smooth", "0.8", text=True),
    _theirs("W8A8", "smoothquant 0.8, gptq", "--method", "gptq", "--smooth", "0.8", text=True),
    _ours("W8A8_STATIC", "rtn", "rtn", text=True),
    _ours("W8A8_STATIC", "smoothquant", "smoothquant", text=True),
    _ours("FP8_DYNAMIC", "rtn", "rtn", text=False),
    _theirs("FP8_DYNAMIC", "rtn", "--method", "rtn", text=False),
    _ours("FP8_BLOCK", "rtn", "rtn", text=False),
    _theirs("FP8_BLOCK", "rtn", "--method", "rtn", text=False),
    _ours("FP8_STATIC", "rtn", "rtn", text=True),
    _theirs("FP8_STATIC", "rtn", "--method", "rtn", text=True, called="FP8"),
)


def scheme_of(point: Measured | Point) -> str:
    """The scheme that the name of a point begins with."""
    return point.name.split(" ", 1)[0]


def rows(points: list[Measured], plain: list[Measured] | None = None) -> list[Row]:
    """One row per point; one of ours has its KL over the other tool's best of the same scheme, paired over blocks.

    plain: of a twin, the same points of the model without outliers. What round to nearest loses more on the twin than
    there is what the other methods can win back.
    """
    table = []
    nearest = {scheme_of(point): point for point in points if point.tool == OURS and point.name.endswith(" rtn")}
    before = {point.name: point for point in plain or () if point.tool == OURS}
    for point in points:
        row: Row = {
            "scheme": scheme_of(point),
            "tool": point.tool,
            "method": point.name.split(" ", 1)[1],
            "bits_of_linears": point.linear_bits,
            "kl": asdict(mean_per_token(point.sums.kl, point.sums.tokens)),
            "kl_by_seed": point.seeds,
            "perplexity": point.sums.perplexity,
            "top1": point.sums.agreement,
        }
        rivals = [other for other in points if other.tool == PEER and scheme_of(other) == scheme_of(point)]
        if point.tool == OURS and rivals:
            best = min(rivals, key=lambda other: other.sums.mean_kl)
            row["ratio"] = asdict(ratio(point.sums.kl, best.sums.kl))
        rtn = nearest.get(scheme_of(point))
        if rtn is not None and rtn is not point and rtn.name in before:
            row["won_back"] = asdict(outlier_recovery(point.sums.kl, rtn.sums.kl, before[rtn.name].sums.kl))
        table.append(row)
    return table


def render(table: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| scheme | method | tool | bits, linears | KL to base | top-1 | KL over the best of llm-compressor's "
        "| won back of what the twin adds to rtn |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        over, back = (Estimate(**row[key]).text() if key in row else "" for key in ("ratio", "won_back"))
        lines.append(
            f"| {row['scheme']} | {row['method']} | {row['tool']} | {row['bits_of_linears']:.3f} | "
            f"{Estimate(**row['kl']).text(5)} | {row['top1']:.1%} | {over} | {back} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="directory with data/ and models/")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"), help="artifacts and kept scores")
    parser.add_argument("--models", nargs="+", choices=tuple(cases.MODELS), default=["tales-6m", "tales-6m-twin"])
    parser.add_argument("--schemes", nargs="+", help="these alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(cases.SEEDS))
    parser.add_argument("--eval-tokens", type=int, default=cases.EVAL_TOKENS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--any-version", action="store_true", help="take our artifacts made by other versions as well")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    workspace = Workspace(
        arguments.work.resolve(), arguments.shared.resolve(), None, arguments.threads, arguments.any_version
    )
    points = [p for p in POINTS if arguments.schemes is None or scheme_of(p) in arguments.schemes]
    tables: dict[str, list[Row]] = {}
    measured: dict[str, list[Measured]] = {}
    for model in arguments.models:
        measured[model] = measure(
            workspace, model, points, arguments.seeds, arguments.eval_tokens, load_rounding_inputs
        )
        tables[model] = rows(measured[model], measured.get(model.removesuffix("-twin")) if "-twin" in model else None)
        print(f"\n{model}\n\n{render(tables[model])}")
    if arguments.json:
        record = {
            "machine": machine.facts(),
            "versions": machine.versions("compress", "torch", "transformers", "compressed-tensors"),
            "eval_tokens": arguments.eval_tokens,
            "calibration": {"samples": cases.SAMPLES, "seq_len": cases.SEQ_LEN, "seeds": arguments.seeds},
            "models": {name: workspace.digest(workspace.model_dir(name)) for name in arguments.models},
            "rows": tables,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

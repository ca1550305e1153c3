"""A trained mixture of experts under quantising and pruning: KL to it on held-out text, and how its experts are used.

    python -m benchmarks.mixture --shared ../shared --json benchmarks/results/mixture.json

`scripts/upcycle_mixture.py` makes the mixture from tales-6m on the training text, once for each of its settings; what
calibrates and what is scored are texts of other books. Everything is kept below `--work`. Prints Markdown.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, runs
from benchmarks.intervals import Estimate, mean_per_token
from benchmarks.scored import scores
from benchmarks.scoring import BlockSums
from benchmarks.workspace import ROOT, Workspace, product_digest

PARENT, MIXTURE, SEED = "tales-6m", "mixture", 0
SETTINGS = {"experts": 4, "chosen": 2, "dropped": 0.25, "steps": 140}
KEEP = 0.79
"""Of all parameters: three of four experts."""
SPARSITY, INSIDE = 0.5, 0.35
"""Of all linears, and of those that three of four experts leave, for as many weights gone in all."""
RANDOM_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Row:
    """One row: its stages, or which experts stay of every mixture ("random N", "most used")."""

    name: str
    stages: tuple[dict[str, Any], ...] = ()
    kept: str = ""

    @property
    def folder(self) -> str:
        return "".join(mark for mark in self.name.replace(" ", "-") if mark not in ",`:()")


def _quantised(bits: int, method: str, experts: str | None = None) -> Row:
    stage: dict[str, Any] = {"kind": "quantize", "method": method, "scheme": {"bits": bits, "group_size": 128}}
    if experts is not None:
        stage["calibration"] = {"experts": experts}
    return Row(f"W{bits} g128, {method}" + (f", `experts: {experts}`" if experts else ""), (stage,))


def _experts(choose: str) -> dict[str, Any]:
    return {"kind": "prune", "method": {"kind": "experts", "choose": choose}, "keep": KEEP, "calibration": {}}


def _zeros(sparsity: float) -> dict[str, Any]:
    return {"kind": "prune", "method": "sparsegpt", "sparsity": sparsity, "calibration": {}}


USED = _quantised(4, "gptq", "routed")
ROWS = (
    _quantised(4, "rtn"),
    USED,
    _quantised(4, "gptq", "all"),
    _quantised(3, "rtn"),
    _quantised(3, "gptq", "routed"),
    _quantised(3, "gptq", "all"),
    Row("3 of 4 experts, `choose: saliency`", (_experts("saliency"),)),
    Row("3 of 4 experts, `choose: error`", (_experts("error"),)),
    Row("3 of 4 experts, `choose: clusters`", (_experts("clusters"),)),
    Row("3 of 4 experts, most used", kept="most used"),
    *(Row(f"3 of 4 experts, at random ({seed})", kept=f"random {seed}") for seed in RANDOM_SEEDS),
    Row(f"sparsegpt, {SPARSITY:.0%} of all linears", (_zeros(SPARSITY),)),
    Row(f"3 of 4 experts by clusters, then sparsegpt, {INSIDE:.0%}", (_experts("clusters"), _zeros(INSIDE))),
    Row(f"3 of 4 experts by saliency, then sparsegpt, {INSIDE:.0%}", (_experts("saliency"), _zeros(INSIDE))),
    Row(f"3 of 4 experts by error, then sparsegpt, {INSIDE:.0%}", (_experts("error"), _zeros(INSIDE))),
)


def _mixture(workspace: Workspace) -> tuple[Path, dict[str, Any]]:
    """The trained mixture, made now unless it is there, and the report of its training."""
    parent, text = workspace.model_dir(PARENT), workspace.shared / "data" / "tales"
    identity = {"parent": workspace.digest(parent), "text": (text / "tales_train.txt.xz").stat().st_size, **SETTINGS}
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    folder = workspace.path / "models" / f"{PARENT}-mixture-{name}"
    if not runs.is_kept(folder, identity):
        print("training the mixture", file=sys.stderr)
        words = [f"--{name}={value}" for name, value in SETTINGS.items()]
        words += [f"--parent={parent}", f"--text={text / 'tales_train.txt.xz'}", f"--output={folder / 'model'}"]
        words.append(f"--validation={text / 'tales_calib.txt'}")
        script = ROOT / "scripts" / "upcycle_mixture.py"
        runs.run(folder, identity, [sys.executable, str(script), *words], workspace.threads)
    return folder / "model", runs.output_of(folder)


def _made(workspace: Workspace, row: Row, base: Path) -> Path:
    """The artifact of one row."""
    folder = workspace.path / MIXTURE / row.folder
    identity = {"model": workspace.digest(base), "stages": row.stages, "kept": row.kept, "product": product_digest()}
    identity = json.loads(json.dumps(identity))
    if runs.is_kept(folder, identity, ignoring=("product",) if workspace.any_version else ()):
        return folder / "artifact"
    print(row.name, file=sys.stderr)
    if not row.stages:
        shutil.rmtree(folder, ignore_errors=True)
        _without(base, _staying(workspace, row.kept, base), folder / "artifact")
        (folder / "result.json").write_text(json.dumps({"identity": identity, "output": {}}))
        return folder / "artifact"
    text = {"source": str(workspace.calibration(MIXTURE, SEED).resolve())}
    text |= {"samples": cases.SAMPLES, "seq_len": cases.SEQ_LEN}
    stages = [
        {**stage, "calibration": {**text, **stage["calibration"]}} if "calibration" in stage else stage
        for stage in row.stages
    ]
    recipe = json.dumps({"version": 1, "seed": SEED, "stages": stages})
    command = [str(Path(sys.executable).with_name("compress")), "run", str(folder / "recipe.yaml")]
    command += ["--model", str(base), "--output", str(folder / "artifact"), "--no-eval", "--json", "--quiet"]
    runs.run(folder, identity, command, workspace.threads, lambda: (folder / "recipe.yaml").write_text(recipe))
    return folder / "artifact"


def _used(workspace: Workspace, base: Path) -> list[list[int]]:
    """Calibration tokens that the router sends each expert, block by block, as the report of `USED` has them."""
    layers = json.loads((_made(workspace, USED, base) / "layers.json").read_text())
    found: dict[int, dict[int, int]] = {}
    for layer in layers:
        if (tokens := layer["details"].get("routed_tokens")) is not None:
            number = int(layer["name"].split(".experts.")[1].split(".")[0])
            found.setdefault(layer["block"], {})[number] = tokens
    return [[each[number] for number in sorted(each)] for _, each in sorted(found.items())]


def _staying(workspace: Workspace, kept: str, base: Path) -> list[list[int]]:
    """The experts that stay of every block."""
    count = SETTINGS["experts"]
    if kept == "most used":
        return [sorted(sorted(range(len(row)), key=row.__getitem__)[1:]) for row in _used(workspace, base)]
    generator = torch.Generator().manual_seed(int(kept.split()[1]))
    blocks = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    return [torch.randperm(int(count), generator=generator)[1:].sort().values.tolist() for _ in range(blocks)]


def _without(base: Path, staying: list[list[int]], output: Path) -> None:
    """The mixture with these experts alone."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    for layer, kept in zip(model.model.layers, staying, strict=True):
        for module, name in (
            (layer.mlp.experts, "gate_up_proj"), (layer.mlp.experts, "down_proj"), (layer.mlp.gate, "weight"),
        ):  # fmt: skip
            setattr(module, name, torch.nn.Parameter(getattr(module, name).data[kept].contiguous()))
    model.config.num_local_experts = len(staying[0])
    model.save_pretrained(output)


def _kl(sums: BlockSums) -> Estimate:
    return mean_per_token(sums.kl, sums.tokens)


def _table(sums: dict[str, BlockSums], rows: tuple[Row, ...]) -> str:
    lines = ["| | KL to the mixture | top-1 | perplexity |", "|---|---|---|---|"]
    lines.append(f"| the mixture | 0 | | {sums['base'].perplexity:.2f} |")
    for row in rows:
        each = sums[row.name]
        lines.append(f"| {row.name} | {_kl(each).text(4)} | {each.agreement:.1%} | {each.perplexity:.2f} |")
    return "\n".join(lines)


def _usage(tokens: list[list[int]]) -> dict[str, Any]:
    """How evenly each block uses its experts: entropy over that of even use, and the least share of any expert."""
    shares = [[count / sum(row) for count in row] for row in tokens]
    entropy = [-sum(share * math.log(share) for share in row if share) / math.log(len(row)) for row in shares]
    return {"tokens": tokens, "entropy": entropy, "least_share": min(min(row) for row in shares)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="directory with data/ and models/")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"), help="models, artifacts and tokens")
    parser.add_argument("--rows", type=int, nargs="*", help="only these rows, counted from 0")
    parser.add_argument("--eval-tokens", type=int, default=16_384)
    parser.add_argument("--any-version", action="store_true", help="take artifacts of other versions of the package")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    arguments = parser.parse_args()
    workspace = Workspace(arguments.work, arguments.shared, None, threads=1, any_version=arguments.any_version)
    base, training = _mixture(workspace)
    cases.MODELS[MIXTURE] = cases.Model(f"path:{base}", "tales", ())
    rows = ROWS if arguments.rows is None else tuple(ROWS[number] for number in arguments.rows)
    paths = {"base": base, PARENT: workspace.model_dir(PARENT)}
    paths |= {row.name: _made(workspace, row, base) for row in rows}
    sums = scores(workspace, MIXTURE, paths, arguments.eval_tokens)
    usage = _usage(_used(workspace, base)) if USED in rows else None
    print(_table(sums, (Row(PARENT), *rows)))
    print(f"\ntraining: {json.dumps(training)}\n\nuse of the experts: {json.dumps(usage)}")
    if arguments.json is not None:
        scored = {name: {"kl": vars(_kl(each)), "perplexity": each.perplexity} for name, each in sums.items()}
        record = {"training": training, "settings": SETTINGS, "tokens": arguments.eval_tokens, "usage": usage}
        arguments.json.write_text(json.dumps({**record, "scores": scored}, indent=1) + "\n")


if __name__ == "__main__":
    main()

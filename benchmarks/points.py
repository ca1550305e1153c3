"""Points of several tools, each one setting: made in the tool's own environment, sized, and scored on held-out text."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import safe_open

from benchmarks import cases, runs
from benchmarks.scored import scores
from benchmarks.scoring import BlockSums, Loader, load_dense
from benchmarks.workspace import ROOT, Workspace, file_digest, product_digest

OURS = "compress"


@dataclass(frozen=True)
class Tool:
    """Another tool: the script that runs it, and the variable that names the Python of its environment."""

    script: str
    python: str


TOOLS = {
    "llm-compressor": Tool("peer_llmcompressor.py", "PEER_LLMC_PYTHON"),
    "AutoRound": Tool("peer_autoround.py", "PEER_AUTOROUND_PYTHON"),
    "llama.cpp": Tool("peer_llamacpp.py", "PEER_LLAMACPP_PYTHON"),
    "HQQ": Tool("peer_hqq.py", "PEER_HQQ_PYTHON"),
}


@dataclass(frozen=True)
class Point:
    """One setting of one tool.

    arguments: of the other tool's script. text: whether it reads the calibration tokens. recipe: ours, as YAML; its
    calibration and seed are replaced by those of the run.
    """

    tool: str
    name: str
    arguments: tuple[str, ...] = ()
    text: bool = True
    recipe: str = ""

    @property
    def label(self) -> str:
        return f"{self.tool} {self.name}"


@dataclass(frozen=True)
class Measured:
    """One point: bits per parameter of the file, per weight of the linears, and its sums averaged over the seeds."""

    tool: str
    name: str
    file_bits: float
    linear_bits: float
    sums: BlockSums
    seeds: list[float]


class NotAvailable(Exception):
    """A tool without an environment here, and without a kept artifact."""


def make(workspace: Workspace, point: Point, model: str, seed: int) -> Path:
    """The folder of a finished run of one point, with `artifact` in it.

    Raises:
        NotAvailable: the tool's environment is not given.
        RuntimeError: the tool fails.
    """
    folder = workspace.path / "points" / model / f"{point.label.replace(' ', '-')}-s{seed}"
    source, calibration = workspace.model_dir(model), workspace.calibration(model, seed)
    identity = {
        "model": workspace.digest(source),
        "tokens": file_digest([calibration]) if point.text else None,
        "arguments": list(point.arguments),
        "product": product_digest() if point.tool == OURS else None,
        "recipe": point.recipe,
    }
    if runs.is_kept(folder, identity, ignoring=("product",) if workspace.any_version else ()):
        return folder
    print(f"{model}, seed {seed}: {point.label}", file=sys.stderr)
    if point.tool == OURS:
        text = seeded(point, calibration, seed)
        command = [
            *(str(Path(sys.executable).with_name("compress")), "quantize", str(source)),
            *("--recipe", str(folder / "recipe.yaml"), "--output", str(folder / "artifact")),
            *("--no-eval", "--json", "--quiet", "--threads", str(workspace.threads)),
        ]
        runs.run(folder, identity, command, workspace.threads, lambda: (folder / "recipe.yaml").write_text(text))
        return folder
    tool = TOOLS[point.tool]
    if not os.environ.get(tool.python):
        raise NotAvailable(f"{point.label} is left out: {tool.python} does not say where {point.tool} is")
    command = [
        *(os.environ[tool.python], str(ROOT / "benchmarks" / tool.script), "--model", str(source), *point.arguments),
        *("--output", str(folder / "artifact"), "--threads", str(workspace.threads)),
        *(("--calib-tokens", str(calibration)) if point.text else ()),
    ]
    runs.run(folder, identity, command, workspace.threads)
    return folder


def seeded(point: Point, calibration: Path, seed: int) -> str:
    """A frozen recipe on the token file of one seed; copies that it redraws are of these windows."""
    recipe: dict[str, Any] = yaml.safe_load(point.recipe)
    if point.text:
        source = {"source": str(calibration), "samples": cases.SAMPLES, "seq_len": cases.SEQ_LEN}
        recipe["stages"] = [
            {**stage, "calibration": {**stage.get("calibration", {}), **source}} for stage in recipe["stages"]
        ]
    return json.dumps({**recipe, "seed": seed}, indent=2) + "\n"


def bits(base: Path, folder: Path) -> tuple[float, float]:
    """Bits per parameter of the whole file and per weight of the blocks' linears: as the tool says, or as stored."""
    parameters = {name: count for name, (count, _) in tensors(base).items()}
    linears = sum(count for name, count in parameters.items() if in_linear(name))
    printed = runs.output_of(folder)
    if "stored_bytes" in printed:
        whole, blocks = printed["stored_bytes"], printed["linear_bytes"]
    else:
        stored = {name: size for name, (_, size) in tensors(folder / "artifact").items()}
        whole, blocks = sum(stored.values()), sum(size for name, size in stored.items() if in_linear(name))
    return 8 * whole / sum(parameters.values()), 8 * blocks / linears


def tensors(model_dir: Path) -> dict[str, tuple[int, int]]:
    """Every stored tensor: how many numbers, and how many bytes."""
    found = {}
    for shard in sorted(model_dir.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                tensor = handle.get_tensor(name)
                found[name] = tensor.numel(), tensor.numel() * tensor.element_size()
    return found


def in_linear(name: str) -> bool:
    """Whether a stored tensor holds numbers of a linear of a decoder block; its shape, stored too, is none of them."""
    return ".layers." in name and "norm" not in name and not name.endswith("weight_shape")


def measure(
    workspace: Workspace,
    model: str,
    points: Sequence[Point],
    seeds: Sequence[int],
    eval_tokens: int,
    load: Loader = load_dense,
) -> list[Measured]:
    """Every point that can be made, with its sizes and scores; what reads no text has one seed.

    A tool without an environment counts with the seeds that are kept.
    """
    made: dict[Point, list[Path]] = {}
    for point in points:
        for seed in seeds if point.text else seeds[:1]:
            try:
                folder = make(workspace, point, model, seed)
            except NotAvailable as absent:
                print(f"seed {seed}: {absent}", file=sys.stderr)
            else:
                made.setdefault(point, []).append(folder)
    artifacts = {str(folder): folder / "artifact" for folders in made.values() for folder in folders}
    scored = scores(workspace, model, artifacts, eval_tokens, load)
    measured = []
    for point, folders in made.items():
        whole, linears = np.mean([bits(workspace.model_dir(model), folder) for folder in folders], axis=0)
        sums = [scored[str(folder)] for folder in folders]
        kl_by_seed = [seed.mean_kl for seed in sums]
        measured.append(Measured(point.tool, point.name, float(whole), float(linears), _mean_of(sums), kl_by_seed))
    return measured


def _mean_of(seeds: list[BlockSums]) -> BlockSums:
    """The seeds' sums averaged block by block."""
    columns = ("tokens", "nll", "kl", "top1")
    return BlockSums(**{name: np.mean([getattr(sums, name) for sums in seeds], axis=0) for name in columns})

"""Scores of artifacts, kept by the hashes of their weights and of the base: nothing is scored twice."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.scoring import BlockSums, Loader, load_dense, score
from benchmarks.workspace import Workspace, weights_digest


def scores(
    workspace: Workspace,
    model: str,
    artifacts: Mapping[str, Path],
    eval_tokens: int,
    load: Loader = load_dense,
    together: int = 8,
) -> dict[str, BlockSums]:
    """The sums of every artifact by name, on the first `eval_tokens` held-out tokens of the model's corpus.

    load: how a candidate becomes a model; its name is part of what scores are kept by. together: how many candidates
    are in memory at once.
    """
    base, folder = workspace.model_dir(model), workspace.path / "scores"
    key = workspace.digest(base)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    how = "" if load is load_dense else f"-{load.__name__}"
    kept = {
        name: folder / f"{key}-{weights_digest(path)[:16]}-{eval_tokens}{how}.json" for name, path in artifacts.items()
    }
    missing = [name for name, file in kept.items() if not file.exists()]
    windows = workspace.held_out(model, eval_tokens) if missing else None
    for start in range(0, len(missing), together):
        names = missing[start : start + together]
        print(f"scoring {start + len(names)} of {len(missing)} artifacts of {model}", file=sys.stderr)
        assert windows is not None
        found = score(base, {name: artifacts[name] for name in names}, windows, load)
        for name in names:
            found[name].save(kept[name])
    return {name: BlockSums.load(file) for name, file in kept.items()}

"""The benchmarks' working directory: models, token files, artifacts of both tools, and cached scores.

Nothing is run twice: a finished run is kept with the identity of its inputs (model, tokens, settings, and for ours the
source tree of the package), and is redone only when that identity changes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import cases, runs, tokens
from benchmarks.outlier_twin import make_twin

ROOT = Path(__file__).resolve().parent.parent
Tokens = NDArray[np.int64]


def file_digest(paths: Iterable[Path]) -> str:
    """sha256 over the names and contents of files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as handle:
            while chunk := handle.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def weights_digest(model_dir: Path) -> str:
    """sha256 over the config and the safetensors files of a model directory."""
    return file_digest([model_dir / "config.json", *sorted(model_dir.glob("*.safetensors"))])


@cache
def product_digest() -> str:
    """sha256 over the package's own sources, so that results of older code are not taken for today's."""
    files = [p for p in (ROOT / "compress").rglob("*") if p.suffix in (".py", ".cpp", ".h", ".toml")]
    return file_digest(sorted(files))


@dataclass(frozen=True)
class Run:
    """One quantisation: a model, a method variant, a scheme, a calibration seed, and the tool that does it."""

    tool: str
    model: str
    variant: str
    bits: int
    group: int | str
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.tool}/{self.model}/{self.variant}-w{self.bits}-{self.group}-s{self.seed}"


class Workspace:
    """Everything below one directory; `shared` is the directory with `data/` and `models/`.

    `any_version` takes our cached artifacts whatever version of the package's sources made them.
    """

    def __init__(
        self, path: Path, shared: Path, peer_python: Path | None, threads: int, any_version: bool = False
    ) -> None:
        self.path, self.shared, self.peer_python, self.threads = path, shared, peer_python, threads
        self.any_version = any_version
        self._digests: dict[Path, str] = {}
        self._written: set[Path] = set()

    def digest(self, model_dir: Path) -> str:
        if model_dir not in self._digests:
            self._digests[model_dir] = weights_digest(model_dir)
        return self._digests[model_dir]

    def model_dir(self, name: str) -> Path:
        """The directory of a model of `cases.MODELS`; a twin is written on first use and when its source changes."""
        kind, _, what = cases.MODELS[name].source.partition(":")
        if kind == "shared":
            return self.shared / "models" / what
        if kind == "path":
            return Path(what).resolve()
        if kind == "packaged":
            import compress

            return Path(compress.default_model())
        source = self.model_dir(what)
        target = self.path / "models" / f"{what}-twin-{self.digest(source)[:12]}"
        if not (target / "model.safetensors").exists():
            shutil.rmtree(target, ignore_errors=True)
            make_twin(source, target)
        return target

    def _encoded(self, model: str, held_out: bool) -> tuple[Tokens, int]:
        corpus, model_dir = cases.MODELS[model].corpus, self.model_dir(model)
        text = self.shared / "data" / tokens.CORPORA[corpus][1 if held_out else 0]
        bos = json.loads((model_dir / "config.json").read_text())["bos_token_id"]
        return tokens.encode(text, model_dir, collapse_newlines=corpus == "tinystories"), bos

    def calibration(self, model: str, seed: int) -> Path:
        """The token file (samples, seq) of one seed that both tools read."""
        path = self.path / "tokens" / f"{model}-s{seed}.safetensors"
        if path not in self._written:
            ids, bos = self._encoded(model, held_out=False)
            tokens.save(tokens.calibration_windows(ids, bos, cases.SAMPLES, cases.SEQ_LEN, seed), path)
            self._written.add(path)
        return path

    def held_out(self, model: str, count: int) -> Tokens:
        """Held-out windows (count, 1 + seq) int64."""
        ids, bos = self._encoded(model, held_out=True)
        return tokens.held_out_windows(ids, bos, cases.SEQ_LEN, count)

    def artifact(self, run: Run) -> Path:
        """The artifact of a run, made now unless one of the same identity is there. RuntimeError: the tool fails."""
        folder = self.path / run.folder
        identity = self._identity(run)
        if not runs.is_kept(folder, identity, ignoring=("product",) if self.any_version else ()):
            if run.tool == "peer":
                runs.run(folder, identity, self._peer_command(run, folder), self.threads)
            else:
                recipe = self._recipe(run)
                command = self._our_command(run, folder)
                runs.run(folder, identity, command, self.threads, lambda: (folder / "recipe.yaml").write_text(recipe))
        return folder / "artifact"

    def _identity(self, run: Run) -> dict[str, Any]:
        variant = cases.VARIANTS[run.variant]
        return {
            "model": self.digest(self.model_dir(run.model)),
            "tokens": None if variant.method == "rtn" else self._tokens_digest(run),
            "method": variant.method,
            "settings": variant.settings if run.tool == "ours" else {},
            "bits": run.bits,
            "group": run.group,
            "product": product_digest() if run.tool == "ours" else None,
        }

    def _tokens_digest(self, run: Run) -> str:
        return hashlib.sha256(self.calibration(run.model, run.seed).read_bytes()).hexdigest()

    def _peer_command(self, run: Run, folder: Path) -> list[str]:
        if self.peer_python is None:
            hint = "set PEER_LLMC_PYTHON or --peer-python"
            raise RuntimeError(f"{run.folder} is not cached and llm-compressor's Python is unknown: {hint}")
        return [
            *(str(self.peer_python), str(ROOT / "benchmarks" / "peer_llmcompressor.py")),
            *("--model", str(self.model_dir(run.model)), "--method", cases.VARIANTS[run.variant].method),
            *("--bits", str(run.bits), "--group-size", str(run.group), "--threads", str(self.threads)),
            *("--calib-tokens", str(self.calibration(run.model, run.seed)), "--output", str(folder / "artifact")),
        ]

    def _our_command(self, run: Run, folder: Path) -> list[str]:
        return [
            *(str(Path(sys.executable).with_name("compress")), "quantize", str(self.model_dir(run.model))),
            *("--recipe", str(folder / "recipe.yaml"), "--output", str(folder / "artifact"), "--no-eval", "--json"),
        ]

    def _recipe(self, run: Run) -> str:
        variant = cases.VARIANTS[run.variant]
        stage: dict[str, Any] = {
            "kind": "quantize",
            "method": {"kind": variant.method, **variant.settings},
            "scheme": {"bits": run.bits, "group_size": run.group, "symmetric": True},
        }
        if variant.method != "rtn":
            source = str(self.calibration(run.model, run.seed))
            stage["calibration"] = {"source": source, "samples": cases.SAMPLES, "seq_len": cases.SEQ_LEN}
        return json.dumps({"version": 1, "seed": run.seed, "stages": [stage]}, indent=2) + "\n"

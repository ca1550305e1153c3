"""Runs the notebooks from top to bottom and stores what they show: `python scripts/run_notebooks.py [NAME ...]`.

Each runs in an empty directory of its own, with the interpreter that runs this script. What was shown is stored without
times and versions, so that a run that shows the same changes little; one that fails, warns or names a path of this
machine is not stored.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from traitlets.config import Config

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
LIMIT_BYTES = 150_000
LIMIT_SECONDS = 900  # of one cell, on a machine that has much else to do
_ROOTS = ("/root", "/home", "/work", "/tmp", "/usr", "/opt", "/var", "/mnt", "/private", "/Users", "C:\\")
_PATH = re.compile("|".join(rf"(?<![\w.]){re.escape(root)}(?=[/\\]|\b)" for root in _ROOTS))


def notebooks() -> list[Path]:
    """All notebooks in order."""
    return sorted(FOLDER.glob("*.ipynb"))


def execute(path: Path, folder: Path) -> NotebookNode:
    """The notebook as it comes out of a run in `folder`. Raises what nbclient raises when a cell fails or hangs."""
    notebook = nbformat.read(path, as_version=4)
    settings = {name: str(folder / ".settings") for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")}
    environment = {**os.environ, **settings, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    client = NotebookClient(
        notebook,
        timeout=LIMIT_SECONDS,
        startup_timeout=LIMIT_SECONDS,
        kernel_name="python3",
        config=Config({"KernelManager": {"transport_encryption": "auto"}}),
    )
    client.execute(env=environment, cwd=str(folder))
    return clean(notebook)


def clean(notebook: NotebookNode) -> NotebookNode:
    """Without times and versions."""
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for cell in notebook.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
        for output in cell.get("outputs", ()):
            if "metadata" in output:
                output.metadata = {}
    return notebook


def problems(notebook: NotebookNode) -> list[str]:
    """Why this notebook is not fit to be stored; empty if it is."""
    found = []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("its cells were not run once each from top to bottom")
    for number, cell in enumerate(code, 1):
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"cell {number} failed: {output.ename}")
            if output.output_type == "stream" and output.name == "stderr":
                found.append(f"cell {number} wrote to stderr: {output.text.strip()[:200]}")
            if named := _PATH.search(text_of(output)):
                found.append(f"cell {number} shows a path of this machine: {named.group()}")
    size = len(nbformat.writes(notebook).encode())
    if size > LIMIT_BYTES:
        found.append(f"it has {size} bytes, {LIMIT_BYTES} are allowed")
    return found


def text_of(output: NotebookNode) -> str:
    """All of an output that is text; pictures are not."""
    if output.output_type == "stream":
        return str(output.text)
    return "\n".join(str(value) for kind, value in sorted(output.get("data", {}).items()) if kind.startswith("text/"))


def main() -> int:
    """Runs the notebooks asked for, all by default; returns 1 if one is not fit to be stored."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="beginnings of file names, such as 01")
    names = tuple(parser.parse_args().names)
    failed = False
    for path in notebooks():
        if names and not path.name.startswith(names):
            continue
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, Path(folder))
        wrong = problems(notebook)
        print(f"{path.name}: {time.perf_counter() - started:.0f} s", *wrong, sep="\n  ")
        failed = failed or bool(wrong)
        if not wrong:
            nbformat.write(notebook, path)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

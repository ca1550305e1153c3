"""A distillation that is killed while it trains, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from compress.artifact.journal import Journal
from compress.artifact.output import staging_path
from compress.recipe import Recipe

PROGRAM = """
import sys
import torch
torch.set_num_threads(1)
from compress import pipeline
from compress.pipeline import distill_stage
from compress.recipe import load_recipe
distill_stage.CHECKPOINT_SECONDS = 0.0
pipeline.run(load_recipe(sys.argv[1]), output=sys.argv[2])
"""


def killed_midway(recipe: Recipe, output: Path, entries: int = 3) -> None:
    """Runs `recipe`, which names its model, and kills it by SIGKILL once its journal has more than so many entries."""
    written = output.parent / f"{output.name}.yaml"
    written.write_text(recipe.to_yaml())
    journal = staging_path(output.resolve()) / "journal.jsonl"
    child = subprocess.Popen([sys.executable, "-c", PROGRAM, str(written), str(output)])
    try:
        while child.poll() is None and not (journal.exists() and len(Journal(journal).entries) > entries):
            time.sleep(0.02)
    finally:
        child.kill()
        assert child.wait() == -9, "it was to be killed while it worked"

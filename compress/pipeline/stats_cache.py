"""What was measured of a source on a text, kept for other amounts and runs: none of it depends on how much goes.

    STATS/<what>-<key>/shards.jsonl, shard-00000.safetensors    as shards.py has them

The key is a hash over all that decides the content: format version, source, tokens, environment (with the version of
the code), and the settings that matter. What is damaged is measured anew, and a warning says so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.artifact.canonical import sha256_json
from compress.pipeline import shards
from compress.pipeline.cut_job import CutJob
from compress.pipeline.prune_job import PruneJob
from compress.pipeline.work import environment
from compress.progress import NullProgress, Progress

VERSION = 2


def measured(
    job: CutJob, what: str, facts: dict[str, Any], measure: Callable[[], dict[str, Tensor]], progress: Progress
) -> dict[str, Tensor]:
    """The tensors that `measure` gives, by name, from the stage's directory of statistics where they are there.

    what: their name. facts: the settings, as JSON, that they depend on.

    Raises UserError where another process is writing the same, WorkError where they cannot be written.
    """
    path = place(job, what, facts)
    if path is None:
        return measure()
    there, made = path.is_dir(), []

    def make(_: int) -> dict[str, Tensor]:
        made.append(True)
        return {name: tensor.contiguous() for name, tensor in measure().items()}

    shards.complete(path, 1, make, NullProgress(), what)
    if there and made:
        progress.warn(f"the statistics in {path} were damaged or unfinished: measured anew")
    return {name: tensor.clone() for name, tensor in shards.read(path, 0).items()}


def there(job: CutJob | PruneJob, what: str, facts: dict[str, Any], count: int = 1) -> bool:
    """Whether all `count` shards are there, so that a run would measure nothing unless it finds them damaged.

    Hashes the source where anything of this name is kept, and else reads nothing.
    """
    if job.stage.stats is None or job.problems or not any(Path(job.stage.stats).glob(f"{what}-*")):
        return False
    path = place(job, what, facts)
    return path is not None and shards.written(path) >= count


def place(job: CutJob | PruneJob, what: str, facts: dict[str, Any]) -> Path | None:
    """Where they are kept or would be; None where the stage keeps none."""
    if job.stage.stats is None:
        return None
    assert job.calibration is not None
    decides = {
        "version": VERSION,
        "what": what,
        "source": job.checkpoint.digest(),
        "tokens": job.calibration.sha256,
        "environment": environment(job.skeleton.dtype),
        **facts,
    }
    return Path(job.stage.stats) / f"{what}-{sha256_json(decides)[:16]}"

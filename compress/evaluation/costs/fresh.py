"""Load time and memory of a model that was timed: the same model, work and back end, in a fresh process."""

from __future__ import annotations

import math

import torch

from compress.evaluation.costs.process import Fresh, Job, in_fresh_process
from compress.evaluation.costs.workload import Plan
from compress.progress import Progress
from compress.runtime.protocol import Runtime

LOADS = 6  # the fewest whose least and greatest bound the median with 95% confidence


def loaded_afresh(
    runtime: Runtime, work: Plan, kernel: str, kv_cache: str, seconds: float, progress: Progress
) -> Fresh:
    """kernel, kv_cache: what `runtime` was loaded with. seconds: what is not known by then stays unknown, and is said.

    Raises:
        WorkError: out of memory.
    """
    if seconds <= 0:
        progress.warn(f"{runtime.path.name}: no time left for a fresh process: load time and memory are left out")
        return Fresh([], None, None, None, None)
    job = Job(
        path=str(runtime.path),
        device=runtime.device,
        dtype=runtime.dtype,
        kernel="reference" if runtime.name == "transformers" else kernel,  # the same back end
        kv_cache=kv_cache,
        deterministic=runtime.deterministic,
        threads=torch.get_num_threads(),
        prompt=work.prompt,
        tokens=work.rows.shape[1],
        new_tokens=work.new_tokens,
        batch_sizes=work.batch_sizes,
        loads=LOADS,
    )
    progress.begin(f"load {runtime.path.name} in a fresh process", LOADS + 3)
    fresh = in_fresh_process(job, None if math.isinf(seconds) else seconds, progress.advance)
    progress.end()
    if len(fresh.load_seconds) < LOADS:
        missing = "" if fresh.peak_bytes is not None else ", memory not measured"
        progress.warn(
            f"{runtime.path.name}: the time ended after {len(fresh.load_seconds)} of {LOADS} loads in a fresh process"
            + missing
        )
    return fresh

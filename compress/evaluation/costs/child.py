"""The child's side of `process`: a fresh interpreter that loads a model step by step, on command.

Lines of JSON on stdout, one per step; after each the parent answers with a line when it has looked at the memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import sys
import time
from typing import Any

from compress.errors import CompressError

_MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD
_COUNTING = 1 << 16
_TIMING = 1 << 25  # where glibc's own moving threshold ends up


def main() -> None:
    """Reads the job from the first line of stdin, goes through the steps, and reports each on stdout."""
    job = json.loads(sys.stdin.readline())
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the steps alone
        try:
            _steps(job)
        except CompressError as error:
            _say(step="error", kind=type(error).__name__, message=error.message, hint=error.hint)


def _steps(job: dict[str, Any]) -> None:
    import torch

    from compress import content

    torch.set_num_threads(job["threads"])
    cuda = job["device"].startswith("cuda")
    _return_at_once(_COUNTING)
    small = {**job, "path": str(content.default_model()), "prompt": "once", "batch_sizes": [1], "tokens": 8}
    small["kv_cache"] = "auto"
    _use(_load(small), small)  # libraries, thread pools and contexts are there before the count begins
    _release(cuda)
    _say(step="ready", **_device_memory(cuda))
    model = _load(job)
    _say(step="loaded", **_device_memory(cuda, model))
    _use(model, job)
    _say(step="used", **_device_memory(cuda))
    del model
    _return_at_once(_TIMING)
    for _ in range(job["loads"]):
        _release(cuda)
        started = time.perf_counter()
        _load(job)
        if cuda:
            torch.cuda.synchronize()
        _say(step="load", seconds=time.perf_counter() - started)


def _load(job: dict[str, Any]) -> Any:
    from compress.runtime.loading import load

    place = {"device": job["device"], "dtype": job["dtype"], "kernel": job["kernel"]}
    return load(job["path"], kv_cache=job["kv_cache"], deterministic=job["deterministic"], **place)


def _use(model: Any, job: dict[str, Any]) -> None:
    """A forward pass of every batch size and one answer."""
    import torch

    from compress.runtime.protocol import SamplingParams

    ids = torch.zeros(1, job["tokens"], dtype=torch.int64)
    for batch in job["batch_sizes"]:
        model.score(ids.expand(batch, -1))
    model.generate([job["prompt"]], SamplingParams(max_tokens=job["new_tokens"], ignore_end=True))


def _release(cuda: bool) -> None:
    """Gives freed memory back to the system, so that it is not taken for free later."""
    gc.collect()
    if cuda:
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        _glibc("malloc_trim", 0)


def _return_at_once(size: int) -> None:
    """From `size` bytes on, memory goes back to the system when it is freed, so that what is held is what is in use."""
    _glibc("mallopt", _MMAP_THRESHOLD, size)


def _glibc(function: str, *arguments: int) -> None:
    """Calls a function that other C libraries do without; memory is None or rougher there."""
    if sys.platform == "linux" and (found := getattr(ctypes.CDLL(None), function, None)) is not None:
        found(*arguments)


def _device_memory(cuda: bool, model: Any = None) -> dict[str, int]:
    """Bytes allocated, without those that a model takes at load for keys and values to come; and their peak."""
    if not cuda:
        return {}
    import torch

    from compress.runtime.paged_backend import PagedRuntime

    torch.cuda.synchronize()
    reserved = model.model.reserved_bytes if isinstance(model, PagedRuntime) else 0
    return {"allocated": torch.cuda.memory_allocated() - reserved, "peak": torch.cuda.max_memory_allocated()}


def _say(**what: Any) -> None:
    """Reports a step and waits until the parent has taken note of it."""
    print(json.dumps(what), file=sys.__stdout__, flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()

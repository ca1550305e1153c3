"""Memory of each token in every key-value cache: what the engine says, and what a process really takes.

    python -m benchmarks.kv_memory --tokenizer ../shared/data/tales/tokenizer --json benchmarks/results/kv-memory.json

A random model whose cache is as wide as a large one's (2 layers, 8 heads of 128) computes sequences of 512 tokens that
stay in the cache. Its anonymous memory (RssAnon) is read at 2,048 and at 8,192 tokens: what is between is the cache.
Huge pages are turned off for it, because each table of the cache begins one, 2 MB, with its first token. int2 keeps the
last page of each sequence in bfloat16: sequences of one token show what that takes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.make_random_llama import make_random_llama
from compress.runtime.cache_choice import CACHES

SHAPE = {"hidden": 1024, "layers": 2, "ffn": 256, "heads": 8, "kv_heads": 8, "vocabulary": 4096}
FIRST, LAST, SEQUENCE = 2_048, 8_192, 512
ROOM = 300_000  # tokens: every table is large enough to be mapped and taken page by page
THP_DISABLE = 41  # of prctl
OPEN_SEQUENCES = 64


def worker(model: Path, cache: str) -> dict[str, Any]:
    """One cache in this process."""
    import torch

    from compress.runtime.loading import load
    from compress.runtime.native_backend import NativeRuntime
    from compress.runtime.paged_model import Chunk

    torch.set_num_threads(1)
    if ctypes.CDLL(None).prctl(THP_DISABLE, 1, 0, 0, 0) != 0:
        raise SystemExit("error: huge pages cannot be turned off here")
    runtime = load(model, device="cpu", kernel="cpu", cache_tokens=ROOM, kv_cache=cache)
    assert isinstance(runtime, NativeRuntime)
    inner = runtime.model
    seen: dict[int, int] = {}
    for start in range(0, LAST, SEQUENCE):
        pages = inner.pages.take(SEQUENCE)
        inner.step([Chunk(list(range(SEQUENCE)), 0, pages, [SEQUENCE - 1])])
        seen[start + SEQUENCE] = machine.anonymous_bytes(os.getpid())
    whole = machine.anonymous_bytes(os.getpid())
    for _ in range(OPEN_SEQUENCES):
        inner.step([Chunk([1], 0, inner.pages.take(1), [0])])
    return {
        "cache": cache,
        "said_bytes_per_token": inner.cache_bytes,
        "measured_bytes_per_token": (seen[LAST] - seen[FIRST]) / (LAST - FIRST),
        "said_bytes_of_an_open_page": inner.open_page_bytes,
        "measured_bytes_of_a_begun_page": (machine.anonymous_bytes(os.getpid()) - whole) / OPEN_SEQUENCES,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="directory whose tokenizer the model carries")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=2, metavar=("MODEL", "CACHE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(worker(Path(given.worker[0]), given.worker[1])))
        return
    if given.tokenizer is None:
        parser.error("--tokenizer is needed")
    rows = []
    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / "wide-cache"
        make_random_llama(model, given.tokenizer, **SHAPE)
        for cache in CACHES:
            command = [sys.executable, "-m", "benchmarks.kv_memory", "--worker", str(model), cache]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode != 0:
                raise SystemExit(f"error: {cache} ended with {run.returncode}:\n{run.stderr[-2000:]}")
            row = json.loads(run.stdout.splitlines()[-1])
            rows.append(row)
            print(
                "{cache:9} said {said_bytes_per_token:6}, measured {measured_bytes_per_token:8.1f} bytes per token; "
                "a page just begun: {measured_bytes_of_a_begun_page:9.0f}".format(**row),
                flush=True,
            )
    if given.json:
        record = {"command": " ".join(["python -m benchmarks.kv_memory", *sys.argv[1:]]), "machine": machine.facts()}
        given.json.write_text(json.dumps({**record, "shape": SHAPE, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What smaller key-value caches lose: perplexity, KL to the same model over a bfloat16 cache, and bytes per token.

    python -m benchmarks.kv_cache --shared ../shared --json benchmarks/results/kv-cache.json

Every model runs in the native engine with exact products, so the cache is all that differs. Held-out windows of BOS and
512 tokens (256 where the context is shorter), all predicted; the interval resamples blocks of 2,048 tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks import machine, outlier_twin
from benchmarks.intervals import mean_per_token
from benchmarks.tokens import CORPORA, encode, held_out_windows
from compress.content import default_model
from compress.runtime.loading import KV_CACHES, load
from compress.runtime.native_backend import NativeRuntime

BLOCK_TOKENS = 2048


def opened(model: Path, kv_cache: str) -> NativeRuntime:
    runtime = load(model, device="cpu", kernel="cpu", kv_cache=kv_cache)
    assert isinstance(runtime, NativeRuntime)
    return runtime


def losses(model: Path, caches: list[str], windows: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """By cache: KL in nats of each predicted token (windows, seq_len) to bfloat16, and perplexity."""
    runtimes = {cache: opened(model, cache) for cache in ("bfloat16", *caches)}
    found: dict[str, list[np.ndarray]] = {cache: [] for cache in caches}
    surprise = dict.fromkeys(runtimes, 0.0)
    for window in windows:
        ids, targets = torch.from_numpy(window[None, :-1]), torch.from_numpy(window[1:])
        p = torch.empty(0)
        for cache, runtime in runtimes.items():
            q = runtime.score(ids)[0].double().log_softmax(-1)
            surprise[cache] -= float(q.gather(1, targets.long().unsqueeze(1)).sum())
            if cache == "bfloat16":
                p = q
            else:
                found[cache].append((p.exp() * (p - q)).sum(-1).numpy())
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    perplexity = {cache: math.exp(total / tokens) for cache, total in surprise.items()}
    return {cache: np.stack(rows) for cache, rows in found.items()}, perplexity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks/kv-cache"))
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    twin = options.work / "tales-6m-twin"
    if not twin.is_dir():
        outlier_twin.make_twin(default_model(), twin)
    models = {
        "tales-6m": (default_model(), "tales"),
        "tales-6m-twin": (twin, "tales"),
        "stories260K": (options.shared / "models" / "stories260K", "tinystories"),
    }
    caches = [cache for cache in KV_CACHES if cache not in ("auto", "bfloat16")]
    rows = []
    for name, (model, corpus) in models.items():
        base = opened(model, "bfloat16")
        seq_len = min(512, (base.context_length or 512) // 2)
        ids = encode(options.shared / "data" / CORPORA[corpus][1], model, collapse_newlines=corpus == "tinystories")
        assert base.prefix_id is not None
        windows = held_out_windows(ids, base.prefix_id, seq_len, options.tokens)
        fits = [cache for cache in caches if cache != "nvfp4" or base.model.shape.head_dim % 16 == 0]
        lost, perplexity = losses(model, fits, windows)
        print(f"{name}: perplexity over bfloat16 {perplexity['bfloat16']:.3f}")
        for cache, each in lost.items():
            whole = len(each) // (BLOCK_TOKENS // seq_len) * (BLOCK_TOKENS // seq_len)
            sums = each[:whole].reshape(-1, BLOCK_TOKENS).sum(1)
            mean = mean_per_token(sums, np.full(len(sums), float(BLOCK_TOKENS)))
            rows.append(
                {
                    "model": name,
                    "cache": cache,
                    "bytes_per_token": opened(model, cache).model.cache_bytes,
                    "perplexity": perplexity[cache],
                    "perplexity_bfloat16": perplexity["bfloat16"],
                    "kl": mean.value,
                    "low": mean.low,
                    "high": mean.high,
                    "tokens": int(sums.size * BLOCK_TOKENS),
                }
            )
            print(
                "{model:14} {cache:9} {bytes_per_token:6} B, "
                "perplexity {perplexity:.3f}, KL {kl:.3g} [{low:.3g}, {high:.3g}]".format(**rows[-1])
            )
    assert all(math.isfinite(row["kl"]) for row in rows)
    if options.json:
        record = {"command": " ".join(["python -m benchmarks.kv_cache", *sys.argv[1:]]), "machine": machine.facts()}
        options.json.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""A process that keeps one model loaded and times what it is asked for, so that two tools can be measured in turns.

    python -m benchmarks.speed_worker --engine native|transformers --model DIR [--kernel cpu-int8]

Keys and values are kept in bfloat16, as llama.cpp keeps 16 bits of them. Reads one JSON object a line from stdin,
`{"threads", "batch", "prompt", "new", "read"}`, and answers `{"seconds"}` for it: a prompt of `prompt` tokens where
`new` is 0, else `new` steps of `batch` sequences from an empty cache, after a step that is not counted. Before it the
same is done for a second, uncounted: a processor that has slept for some seconds is slow for the first tenths of one
(measured: 200 instead of 300 tokens a second), and llama.cpp's tools are taken by the last of several runs. Tokens are
random, as llama-bench's are: nothing is sampled. With `read` the answer has `"read"` and `"usual"` too: bytes
per second at which as many threads read memory just before and just after, by the best and by the median of five sums.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from compress.evaluation.costs import bandwidth

Timed = Callable[[int, int, int], float]

WARM_SECONDS = 1.0


def native(path: str, kernel: str) -> tuple[Timed, dict[str, Any]]:
    from compress.runtime.loading import load
    from compress.runtime.native_backend import NativeRuntime
    from compress.runtime.paged_model import Chunk

    runtime = load(path, device="cpu", kernel=kernel, cache_tokens=16_384, kv_cache="bfloat16")
    if not isinstance(runtime, NativeRuntime):
        raise SystemExit(f"error: {path} is run by {runtime.name}, not by the native engine")
    model, vocabulary = runtime.model, runtime.vocab_size

    def timed(batch: int, prompt: int, new: int) -> float:
        ids = torch.randint(vocabulary, (max(prompt, new + 1), batch)).tolist()
        if new == 0:
            with model.pages.lend(prompt) as pages:
                started = time.perf_counter()
                model.sequence([row[0] for row in ids], 0, pages, [prompt - 1])
                return time.perf_counter() - started
        per_sequence = -(-(new + 1) // model.pages.tokens)
        with model.pages.lend(batch * per_sequence * model.pages.tokens) as pages:
            own = [pages[i * per_sequence : (i + 1) * per_sequence] for i in range(batch)]
            started = 0.0
            for position in range(new + 1):
                if position == 1:
                    started = time.perf_counter()
                model.step([Chunk([ids[position][i]], position, own[i], [0]) for i in range(batch)])
            return time.perf_counter() - started

    layers = runtime.layers()
    return timed, {
        "kernels": sorted({layer.kernel for layer in layers}),
        "bytes_per_token": sum(layer.read_bytes for layer in layers),
    }


def transformers(path: str, _kernel: str) -> tuple[Timed, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)

    @torch.inference_mode()
    def timed(batch: int, prompt: int, new: int) -> float:
        ids = torch.randint(model.config.vocab_size, (batch, max(prompt, new + 1)))
        if new == 0:
            started = time.perf_counter()
            model(ids, logits_to_keep=1)
            return time.perf_counter() - started
        cache = model(ids[:, :1], use_cache=True).past_key_values
        started = time.perf_counter()
        for position in range(1, new + 1):
            model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        return time.perf_counter() - started

    read = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "embed_tokens" not in name)
    return timed, {"kernels": ["torch bfloat16"], "bytes_per_token": read}


def read_rates() -> list[float]:
    """Bytes per second at which torch's threads read memory that no cache holds, several times."""
    found = bandwidth.read_rates()
    if found is None:
        raise SystemExit("error: no memory to measure the bandwidth in")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=("native", "transformers"), required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--kernel", default="cpu-int8")
    arguments = parser.parse_args()
    timed, facts = (native if arguments.engine == "native" else transformers)(arguments.model, arguments.kernel)
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        torch.set_num_threads(asked["threads"])
        work = (asked["batch"], asked["prompt"], asked["new"])
        started = time.monotonic()
        while time.monotonic() - started < WARM_SECONDS:
            timed(*work)
        if asked["read"]:
            before, seconds, after = read_rates(), timed(*work), read_rates()
            best, usual = ((of(before) + of(after)) / 2 for of in (max, statistics.median))
            answer = {"seconds": seconds, "read": best, "usual": usual}
        else:
            answer = {"seconds": timed(*work)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

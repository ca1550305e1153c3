"""Prune one model with llm-compressor; runs inside llm-compressor's own environment, imports nothing of ours.

Both sides of a comparison read the same token file. Settings are llm-compressor's defaults: SparseGPT with blocks of
128 columns and damping 0.01, Wanda row by row, both on every Linear but the output head, sequential over decoder
blocks. The output is a dense checkpoint.

Prints one JSON object for every job as the last line of its output; algorithm_seconds is the `oneshot` call alone.

    PEER_PYTHON benchmarks/peer_sparse.py --model DIR --jobs '[{"method": "sparsegpt", "calib_tokens": "TOKENS",
        "settings": {"sparsity": 0.5, "mask_structure": "2:4"}, "output": "OUT"}]'
"""

from __future__ import annotations

import argparse
import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--jobs", type=json.loads, required=True, help="method, settings, calib_tokens, output of each")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def modifier(method: str, settings: dict[str, Any]) -> Any:
    """The pruning modifier of one run. settings: `sparsity`, and `mask_structure` n:m where it is not unstructured."""
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    kind = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[method]
    return kind(targets=["Linear"], ignore=["re:.*lm_head"], **settings)


def prune(model_dir: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Prunes a fresh copy of the model, writes it to the job's `output` and returns what is reported of it."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokens = load_file(job["calib_tokens"])["tokens"]
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    started = time.perf_counter()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=[modifier(job["method"], job["settings"])],
        dataset=Dataset.from_list(rows),
        num_calibration_samples=len(rows),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,
        batch_size=1,
    )
    algorithm_seconds = time.perf_counter() - started
    model.save_pretrained(job["output"])
    tokenizer.save_pretrained(job["output"])
    return {
        "tool": "llm-compressor",
        "method": job["method"],
        **job["settings"],
        "threads": torch.get_num_threads(),
        "algorithm_seconds": round(algorithm_seconds, 3),
        "versions": {name: version(name) for name in ("llmcompressor", "transformers", "torch")},
    }


def main() -> None:
    arguments = parse_arguments()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_num_threads(arguments.threads)
    for job in arguments.jobs:
        print("\n" + json.dumps(prune(arguments.model, job)), flush=True)


if __name__ == "__main__":
    main()

"""Prune one model with llm-compressor; runs inside llm-compressor's own environment, imports nothing of ours.

Both sides of a comparison read the same token file. Settings are llm-compressor's defaults: SparseGPT with blocks of
128 columns and damping 0.01, Wanda row by row, both on every Linear but the output head, sequential over decoder
blocks. The output is a dense checkpoint.

Prints one JSON object on its last line of stdout; algorithm_seconds is the `oneshot` call alone.

    PEER_PYTHON benchmarks/peer_sparse.py --model DIR --method sparsegpt --sparsity 0.5 --pattern 2:4 \
        --calib-tokens tokens.npy --output OUT
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
    parser.add_argument("--method", choices=("sparsegpt", "wanda"), required=True)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--pattern", help="n:m as llm-compressor means it; unstructured without it")
    parser.add_argument("--calib-tokens", type=Path, required=True, help="safetensors with `tokens` (samples, seq)")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def modifier(arguments: argparse.Namespace) -> Any:
    """The pruning modifier of one run."""
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    kind = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[arguments.method]
    mask = {} if arguments.pattern is None else {"mask_structure": arguments.pattern}
    return kind(sparsity=arguments.sparsity, targets=["Linear"], ignore=["re:.*lm_head"], **mask)


def main() -> None:
    arguments = parse_arguments()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokens = load_file(arguments.calib_tokens)["tokens"]
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    started = time.perf_counter()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=[modifier(arguments)],
        dataset=Dataset.from_list(rows),
        num_calibration_samples=len(rows),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,
        batch_size=1,
    )
    algorithm_seconds = time.perf_counter() - started
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    result = {
        "tool": "llm-compressor",
        "method": arguments.method,
        "sparsity": arguments.sparsity,
        "pattern": arguments.pattern,
        "threads": torch.get_num_threads(),
        "algorithm_seconds": round(algorithm_seconds, 3),
        "versions": {name: version(name) for name in ("llmcompressor", "transformers", "torch")},
    }
    print("\n" + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

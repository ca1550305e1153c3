"""Quantise one model with llm-compressor; runs inside llm-compressor's own environment, imports nothing of ours.

Both sides of a comparison read the same token file. Settings are llm-compressor's defaults, its best standard ones:
GPTQ with activation order "static", damping 0.01 and chunks of 128 columns, sequential over decoder blocks; AWQ with 20
grid points and duo scaling; SmoothQuant with the strength of its examples, 0.8. The output is a compressed-tensors
checkpoint.

Prints one JSON object on its last line of stdout:
    algorithm_seconds   the `oneshot` call: weights in memory to quantised weights in memory
    load_seconds, save_seconds, process_seconds (from the first line of this script), peak_rss_bytes, versions

    PEER_PYTHON benchmarks/peer_llmcompressor.py --model DIR --method gptq --bits 4 --group-size 128 \
        --calib-tokens tokens.safetensors --output OUT
"""

from __future__ import annotations

import time

PROCESS_START = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
from importlib.metadata import version  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--method", choices=("rtn", "gptq", "awq"), required=True)
    parser.add_argument("--bits", type=int, help="of the codes of a weight-only integer scheme")
    parser.add_argument("--scheme", help="one of llm-compressor's own by name, such as W8A8 or FP8_DYNAMIC, for --bits")
    parser.add_argument("--smooth", type=float, metavar="STRENGTH", help="SmoothQuant before the method")
    parser.add_argument("--group-size", default="128", help="a number, or 'channel'")
    parser.add_argument("--asym", action="store_true", help="asymmetric codes (default: symmetric)")
    parser.add_argument("--calib-tokens", type=Path, help="safetensors file with `tokens` (samples, seq)")
    parser.add_argument(
        "--observer", default="memoryless_minmax", help="weight observer; 'memoryless_mse' searches scales"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="calibration samples per forward pass")
    parser.add_argument("--output", type=Path, help="where to save; nothing is saved without it")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def make_recipe(arguments: argparse.Namespace) -> list[Any]:
    """The modifiers of one run: one scheme on every Linear but the output head."""
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationScheme,
        QuantizationStrategy,
        QuantizationType,
    )
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.awq.mappings import default_mappings

    ignore = ["lm_head"]
    if arguments.scheme is not None:
        scheme: dict[str, Any] = {"targets": ["Linear"], "scheme": arguments.scheme}
    else:
        per_channel = arguments.group_size == "channel"
        weights = QuantizationArgs(
            num_bits=arguments.bits,
            type=QuantizationType.INT,
            symmetric=not arguments.asym,
            strategy=QuantizationStrategy.CHANNEL if per_channel else QuantizationStrategy.GROUP,
            group_size=None if per_channel else int(arguments.group_size),
            observer=arguments.observer,
        )
        scheme = {"config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}}
    smoothed: list[Any] = []
    if arguments.smooth is not None:
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        smoothed = [SmoothQuantModifier(smoothing_strength=arguments.smooth)]
    if arguments.method == "gptq":
        return [*smoothed, GPTQModifier(**scheme, ignore=ignore, block_size=128, dampening_frac=0.01)]
    if arguments.method == "rtn":
        return [*smoothed, QuantizationModifier(**scheme, ignore=ignore)]
    # An architecture that llm-compressor does not know gets the Llama mappings; those it knows keep their own.
    from llmcompressor.modifiers.transform.awq.mappings import AWQ_MAPPING_REGISTRY

    architecture = json.loads((arguments.model / "config.json").read_text())["architectures"][0]
    mappings = None if architecture in AWQ_MAPPING_REGISTRY else default_mappings
    return [
        AWQModifier(mappings=mappings, duo_scaling=True, n_grid=20),
        QuantizationModifier(**scheme, ignore=ignore),
    ]


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
    if not torch.accelerator.is_available():
        # AWQ pins its activation cache, which needs an accelerator; on a CPU it has no meaning.
        torch.Tensor.pin_memory = lambda self, *_, **__: self  # type: ignore[method-assign]
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    load_seconds = time.perf_counter() - started

    options: dict[str, Any] = {}
    if arguments.calib_tokens is not None and (arguments.method != "rtn" or arguments.scheme is not None):
        tokens = load_file(arguments.calib_tokens)["tokens"]
        rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
        options = {
            "dataset": Dataset.from_list(rows),
            "num_calibration_samples": len(rows),
            "max_seq_length": tokens.shape[1],
            "shuffle_calibration_samples": False,
            "batch_size": arguments.batch_size,
        }
    recipe = make_recipe(arguments)
    started = time.perf_counter()
    oneshot(model=model, tokenizer=tokenizer, recipe=recipe, **options)
    algorithm_seconds = time.perf_counter() - started

    started = time.perf_counter()
    if arguments.output is not None:
        model.save_pretrained(arguments.output, save_compressed=True)
        tokenizer.save_pretrained(arguments.output)
    save_seconds = time.perf_counter() - started
    result = {
        "tool": "llm-compressor",
        "method": arguments.method,
        "bits": arguments.bits,
        "scheme": arguments.scheme,
        "smooth": arguments.smooth,
        "group_size": arguments.group_size,
        "symmetric": not arguments.asym,
        "observer": arguments.observer,
        "batch_size": arguments.batch_size,
        "threads": torch.get_num_threads(),
        "algorithm_seconds": round(algorithm_seconds, 3),
        "load_seconds": round(load_seconds, 3),
        "save_seconds": round(save_seconds, 3),
        "process_seconds": round(time.perf_counter() - PROCESS_START, 3),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": {name: version(name) for name in ("llmcompressor", "compressed-tensors", "transformers", "torch")},
    }
    print("\n" + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

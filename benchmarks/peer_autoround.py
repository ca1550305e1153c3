"""Quantise one model with AutoRound; runs inside auto-round's own environment, imports nothing of ours.

Settings are auto-round's defaults (200 iterations, batches of 8), on the token file that our side reads too. The output
is the source's checkpoint with the weights as they are after rounding, in the source's dtype: any evaluator loads it.

    PEER_PYTHON benchmarks/peer_autoround.py --model DIR --bits 4 --calib-tokens tokens.safetensors --output OUT
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from importlib.metadata import version
from pathlib import Path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", default="128", help="a number, or 'channel'")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument(
        "--calib-tokens", type=Path, required=True, help="safetensors file with `tokens` (samples, seq)"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    import torch
    from auto_round import AutoRound
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(arguments.threads)
    size = -1 if arguments.group_size == "channel" else int(arguments.group_size)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    tokens = load_file(arguments.calib_tokens)["tokens"]
    tuner = AutoRound(
        model, AutoTokenizer.from_pretrained(arguments.model), bits=arguments.bits, group_size=size,
        sym=True, iters=arguments.iterations, nsamples=len(tokens), seqlen=tokens.shape[1], batch_size=8,
        dataset=[row.unsqueeze(0) for row in tokens], device_map="cpu",
    )  # fmt: skip
    started, busy = time.perf_counter(), time.process_time()
    tuned, _ = tuner.quantize()
    result = {"wall_seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - busy}
    shutil.copytree(arguments.model, arguments.output)
    rounded = tuned.state_dict()
    linear_bytes = other_bytes = 0.0
    for file in arguments.output.glob("*.safetensors"):
        stored = load_file(file)
        for name, weight in stored.items():
            if ".layers." in name and weight.dim() == 2:  # codes, and a scale of 16 bits for every group
                linear_bytes += weight.numel() * (arguments.bits + 16 / (size if size > 0 else weight.shape[1])) / 8
            else:
                other_bytes += weight.numel() * weight.element_size()
        changed = {name: rounded[name].to(weight.dtype).contiguous() for name, weight in stored.items()}
        save_file(changed, file, {"format": "pt"})
    sizes = {"linear_bytes": linear_bytes, "stored_bytes": linear_bytes + other_bytes}
    print(json.dumps({"tool": "auto-round", "version": version("auto-round"), **result, **sizes}))


if __name__ == "__main__":
    main()

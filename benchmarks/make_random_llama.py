"""Write a Llama checkpoint with random weights: real shapes for speed and memory, without downloading anything.

    python benchmarks/make_random_llama.py --preset 2b --tokenizer TOKENIZER_DIR --output DIR

bfloat16, several safetensors shards with an index, the tokenizer copied from a directory (its vocabulary may be smaller
than the model's). One shard is in memory at a time. The bytes depend on the shape and `--seed` alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

PRESETS = {
    "148m": {"hidden": 768, "layers": 14, "ffn": 2048, "heads": 12, "kv_heads": 12, "vocabulary": 32_000},
    "1.1b": {"hidden": 2048, "layers": 16, "ffn": 8192, "heads": 32, "kv_heads": 8, "vocabulary": 32_000},
    "2b": {"hidden": 2048, "layers": 32, "ffn": 7168, "heads": 16, "kv_heads": 16, "vocabulary": 32_000},
}
Shapes = list[tuple[str, tuple[int, ...]]]


def tensor_shapes(hidden: int, layers: int, ffn: int, heads: int, kv_heads: int, vocabulary: int) -> Shapes:
    """Every tensor of the checkpoint in the order of the model; embedding and head are not tied."""
    kv = hidden // heads * kv_heads
    shapes: Shapes = [("model.embed_tokens.weight", (vocabulary, hidden))]
    for block in range(layers):
        prefix = f"model.layers.{block}"
        shapes += [
            (f"{prefix}.input_layernorm.weight", (hidden,)),
            (f"{prefix}.self_attn.q_proj.weight", (hidden, hidden)),
            (f"{prefix}.self_attn.k_proj.weight", (kv, hidden)),
            (f"{prefix}.self_attn.v_proj.weight", (kv, hidden)),
            (f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)),
            (f"{prefix}.post_attention_layernorm.weight", (hidden,)),
            (f"{prefix}.mlp.gate_proj.weight", (ffn, hidden)),
            (f"{prefix}.mlp.up_proj.weight", (ffn, hidden)),
            (f"{prefix}.mlp.down_proj.weight", (hidden, ffn)),
        ]
    return [*shapes, ("model.norm.weight", (hidden,)), ("lm_head.weight", (vocabulary, hidden))]


def make_tensor(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """One bfloat16 tensor: matrices normal with deviation 0.02, norms near 1; a generator of its own per name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    noise = torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator)
    return noise.mul_(0.1).add_(1.0) if len(shape) == 1 else noise.mul_(0.02)


def shards(shapes: Shapes, limit: int) -> Iterator[Shapes]:
    """Consecutive tensors of at most `limit` bytes together (a larger single tensor is a shard of its own)."""
    current: Shapes = []
    size = 0
    for name, shape in shapes:
        nbytes = 2 * torch.Size(shape).numel()
        if current and size + nbytes > limit:
            yield current
            current, size = [], 0
        current.append((name, shape))
        size += nbytes
    yield current


def make_random_llama(
    output: Path,
    tokenizer: Path,
    *,
    hidden: int,
    layers: int,
    ffn: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    context: int = 2048,
    shard_bytes: int = 500_000_000,
    seed: int = 0,
) -> int:
    """Write the checkpoint and return its number of parameters. FileExistsError when `output` exists."""
    output.mkdir(parents=True)
    shapes = tensor_shapes(hidden, layers, ffn, heads, kv_heads, vocabulary)
    parts = list(shards(shapes, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else "model.safetensors"
        tensors = {name: make_tensor(name, shape, seed) for name, shape in part}
        save_file(tensors, output / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        del tensors
    parameters = sum(torch.Size(shape).numel() for _, shape in shapes)
    if len(parts) > 1:
        index = {"metadata": {"total_size": 2 * parameters}, "weight_map": weight_map}
        (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    source = json.loads((tokenizer / "tokenizer_config.json").read_text())
    vocabulary_file = json.loads((tokenizer / "tokenizer.json").read_text())
    bos = next((t["id"] for t in vocabulary_file["added_tokens"] if t["content"] == source.get("bos_token")), None)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": bos,
        "eos_token_id": bos,
    }
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, output / name)
    return parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=tuple(PRESETS), default="148m", help="shape that the flags below adjust")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory with tokenizer.json and its config")
    parser.add_argument("--output", type=Path, required=True)
    for name in PRESETS["148m"]:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--shard-megabytes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shape = {k: getattr(arguments, k) or v for k, v in PRESETS[arguments.preset].items()}
    if shape["hidden"] % shape["heads"] or shape["heads"] % shape["kv_heads"]:
        parser.error("heads must divide hidden, and kv-heads must divide heads")
    parameters = make_random_llama(
        arguments.output,
        arguments.tokenizer,
        **shape,
        context=arguments.context,
        shard_bytes=arguments.shard_megabytes * 1_000_000,
        seed=arguments.seed,
    )
    print(json.dumps({"output": str(arguments.output), "parameters": parameters, **shape}))


if __name__ == "__main__":
    main()

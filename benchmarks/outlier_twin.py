"""The outlier twin of a Llama-shaped checkpoint: the same function in float32, with outlier channels.

Small trained models have no outlier channels; large ones do, and they are what AWQ, SmoothQuant and rotations are
for. The twin multiplies a few channels of each norm in front of linears by `factor` and divides the matching columns
of those linears by as much. The final norm stays as it is: it feeds the output head, which may be tied to the
embedding. The twin is written in float32, because dividing by 30 in bfloat16 would round the weights and change the
function.

    python benchmarks/outlier_twin.py SOURCE_MODEL_DIR TARGET_DIR
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

# Norm -> linears that read its output, relative to one decoder block.
NORM_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "generation_config.json",
)


def read_weights(model_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint's safetensors files, as stored."""
    shards = sorted(model_dir.glob("*.safetensors"))
    if not shards:
        raise FileNotFoundError(f"no safetensors file in {model_dir}")
    weights: dict[str, torch.Tensor] = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as handle:
            weights.update({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118
    return weights


def make_twin(
    source_dir: str | Path, target_dir: str | Path, channels: float = 0.01, factor: float = 30.0, seed: int = 0
) -> dict[str, list[int]]:
    """Write the twin of `source_dir` to `target_dir` and return the outlier channels of each norm.

    `channels` is the share of each norm's channels that becomes an outlier (at least one). The channels are drawn per
    norm from `seed`. Raises ValueError for an architecture whose norms are not followed by the linears named above,
    FileExistsError when the target holds something already.
    """
    source, target = Path(source_dir), Path(target_dir)
    config = json.loads((source / "config.json").read_text())
    if config.get("model_type") not in SUPPORTED:
        raise ValueError(f"model_type {config.get('model_type')!r} is not one of {', '.join(SUPPORTED)}")
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty")
    weights = {name: tensor.to(torch.float32).clone() for name, tensor in read_weights(source).items()}
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[str, list[int]] = {}
    for block in range(config["num_hidden_layers"]):
        for norm, readers in NORM_READERS.items():
            gain = weights[f"model.layers.{block}.{norm}.weight"]
            count = max(1, round(channels * gain.numel()))
            index = torch.randperm(gain.numel(), generator=generator)[:count].sort().values
            gain[index] *= factor
            for reader in readers:
                weights[f"model.layers.{block}.{reader}.weight"][:, index] /= factor
            chosen[f"model.layers.{block}.{norm}"] = index.tolist()
    target.mkdir(parents=True, exist_ok=True)
    config.pop("torch_dtype", None)
    config["dtype"] = "float32"
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name in COPIED:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="Llama-shaped model directory")
    parser.add_argument("target", type=Path, help="new directory for the twin")
    parser.add_argument("--channels", type=float, default=0.01, help="share of each norm's channels (default 0.01)")
    parser.add_argument("--factor", type=float, default=30.0, help="how much larger those channels become (default 30)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chosen = make_twin(arguments.source, arguments.target, arguments.channels, arguments.factor, arguments.seed)
    print(json.dumps(chosen, indent=2))


if __name__ == "__main__":
    main()

"""Quantise one Llama model with llama.cpp; needs llama-cpp-python, gguf, torch and transformers, nothing of ours.

The checkpoint goes into a float32 GGUF file, llama.cpp's library quantises it as `llama-quantize` does, and gguf
decodes the result into a plain float32 checkpoint that any evaluator loads. With `--calib-tokens` the importance matrix
is what `llama-imatrix` collects, the mean square of every input channel of every linear, but on that token file: every
tool reads the same tokens. Query and key rows keep the order of the checkpoint: llama.cpp quantises row by row, so the
order changes no value.

Prints one JSON object on its last line of stdout; `stored_bytes` are those of the GGUF file's tensors.

    PEER_PYTHON benchmarks/peer_llamacpp.py --model DIR --type Q4_K_M --output OUT
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--type", required=True, help="as llama-quantize names it: Q4_0, Q4_K_M, Q3_K_M, Q2_K ...")
    parser.add_argument("--calib-tokens", type=Path, help="safetensors file with `tokens` (samples, seq): an imatrix")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def gguf_name(name: str) -> str:
    """llama.cpp's name of a checkpoint's tensor, or KeyError for one that a Llama has not."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    return WHOLE[name] if found is None else f"blk.{found[1]}.{PARTS[found[2]]}.weight"


def write_model(config: dict[str, Any], tensors: dict[str, Any], path: Path) -> None:
    """All tensors in float32 with the settings that llama.cpp wants of a Llama, without a tokenizer."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    for name, tensor in tensors.items():
        writer.add_tensor(gguf_name(name), tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def importance_of(model_dir: Path, token_file: Path) -> dict[str, Any]:
    """The importance matrix: for every linear of the blocks the mean squares of its inputs (in,) float32."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokens = load_file(token_file)["tokens"]
    sums: dict[str, Any] = {}

    def collect(name: str) -> Any:
        def hook(_module: Any, inputs: tuple[Any, ...]) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].flatten(0, -2).double().square().sum(0)

        return hook

    for name, module in model.named_modules():
        if ".layers." in name and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(collect(gguf_name(f"{name}.weight")))
    with torch.inference_mode():
        for batch in tokens.split(8):
            model(batch)
    return {name: (total / tokens.numel()).float().numpy() for name, total in sums.items()}


def quantise(source: Path, target: Path, kind: str, importance: dict[str, Any], threads: int) -> None:
    """llama.cpp's own choice of a type for every tensor, and its rounding; SystemExit where it fails."""
    import ctypes

    from llama_cpp import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), threads
    if importance:
        entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()  # the last one, empty, ends the list
        for entry, (name, values) in zip(entries, importance.items(), strict=False):
            entry.name = name.encode()
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = len(values)
        parameters.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    if failed:
        raise SystemExit(f"llama.cpp failed to quantise to {kind}, with code {failed}")


def decode(quantised: Path, source: Path, output: Path) -> dict[str, Any]:
    """Writes the dense float32 checkpoint; returns the bytes of the file and how many tensors have which type."""
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import load_file, save_file

    read = {tensor.name: tensor for tensor in GGUFReader(quantised).tensors}
    shutil.copytree(source, output)
    config = json.loads((source / "config.json").read_text()) | {"dtype": "float32"}
    config.pop("torch_dtype", None)
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in sorted(output.glob("*.safetensors")):
        dense = {}
        for name, weight in load_file(file).items():
            tensor = read[gguf_name(name)]
            dense[name] = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).reshape(weight.shape)
        save_file(dense, file, {"format": "pt"})
    blocks = [t for t in read.values() if t.name.startswith("blk.") and "_norm" not in t.name]
    return {
        "stored_bytes": sum(int(t.n_bytes) for t in read.values()),
        "linear_bytes": sum(int(t.n_bytes) for t in blocks),
        "types": Counter(t.tensor_type.name for t in blocks),
        "embedding": read["token_embd.weight"].tensor_type.name,
    }


def main() -> None:
    arguments = parse_arguments()
    import llama_cpp
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(arguments.threads)
    config = json.loads((arguments.model / "config.json").read_text())
    if config["architectures"] != ["LlamaForCausalLM"]:
        raise SystemExit(f"only Llama models go into GGUF here, not {config['architectures']}")
    folder = arguments.output.parent
    folder.mkdir(parents=True, exist_ok=True)
    whole, made = folder / "float32.gguf", folder / f"{arguments.type}.gguf"
    tensors = {k: v for file in sorted(arguments.model.glob("*.safetensors")) for k, v in load_file(file).items()}
    write_model(config, tensors, whole)
    text = arguments.calib_tokens
    importance = {} if text is None else importance_of(arguments.model, text)
    started = time.perf_counter()
    quantise(whole, made, arguments.type, importance, arguments.threads)
    result = {
        "tool": "llama.cpp",
        "version": f"llama-cpp-python {llama_cpp.__version__}",
        "type": arguments.type,
        "imatrix": text is not None,
        "algorithm_seconds": round(time.perf_counter() - started, 3),
        **decode(made, arguments.model, arguments.output),
    }
    whole.unlink()
    print("\n" + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

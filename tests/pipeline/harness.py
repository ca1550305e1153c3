"""Recipes for tiny runs, and the oracle of a run: the fake-quantised model that its artifact must behave like.

The oracle shares no code with what it checks: safetensors reads the files, the compressed-tensors package decodes the
packed weights by the artifact's own config, and transformers builds the dense model from the source's config.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from compress.artifact.reader import Artifact
from compress.errors import WorkError
from compress.recipe import Recipe
from compress.recipe_build import Settings, build_recipe

CALIBRATED = ("gptq", "awq")
METHODS = ("rtn", *CALIBRATED)
"""The methods for weights alone; smoothquant needs a scheme that rounds inputs."""
INPUT_PARTS = (".input_scale", ".input_global_scale")


def write_text(path: Path, words: int = 4000, seed: int = 0) -> Path:
    """A text of random words of random letters; its bytes are the same on every machine."""
    choose = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ,.;!?"
    path.write_text(" ".join("".join(choose.choices(letters, k=choose.randint(1, 9))) for _ in range(words)))
    return path


def recipe(method: str, text: Path | None = None, **settings: Any) -> Recipe:
    """A recipe for a tiny model: 4 bits in groups of 32, calibrated on 8 windows of 24 tokens unless said otherwise."""
    layout = {} if "scheme" in settings else {"bits": 4, "group_size": 32}
    given: dict[str, Any] = {"method": method, **layout, **settings}
    reads = method in (*CALIBRATED, "smoothquant", "hadamard", "sweep", "autoround")
    if reads or str(settings.get("scheme")).endswith(("_STATIC", "NVFP4")):
        given = {"calib": str(text), "samples": 8, "seq_len": 24, **given}
    else:
        given = {key: value for key, value in given.items() if key not in ("calib", "samples", "seq_len")}
    return build_recipe(Settings(**given))[0]


def with_options(wanted: Recipe, **options: Any) -> Recipe:
    """The recipe with settings of its method changed."""
    stage = wanted.stages[0]
    method = type(stage.method).model_validate({**stage.method.model_dump(), **options})
    return wanted.model_copy(update={"stages": [stage.model_copy(update={"method": method})]})


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a model directory, of one shard or of many."""
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def block_matrices(stored: dict[str, Tensor]) -> set[str]:
    """The 2-D tensors of decoder blocks that are no router: all that must be quantised, by name and shape alone."""
    inside = re.compile(r"(^|\.)(layers|h)\.\d+\.")
    routers = ("mlp.gate.weight", "block_sparse_moe.gate.weight")
    return {n for n, t in stored.items() if t.ndim == 2 and inside.search(n) and not n.endswith(routers)}


def decoded(artifact: Artifact) -> dict[str, Tensor]:
    """What the artifact's tensors stand for, by the source's names: quantised weights (out, in) as values.

    Where inputs are rounded too, kernels multiply codes and apply the scale in float32, so values are float32.
    """
    stored = tensors(artifact.path)
    beside = (*INPUT_PARTS, ".k_scale", ".v_scale")
    found = {name: t for name, t in stored.items() if ".weight_" not in name and not name.endswith(beside)}
    for linear in sorted({name.rpartition(".weight_")[0] for name in stored if ".weight_" in name}):
        scheme = scheme_of(artifact, linear)
        local = {n.removeprefix(linear + "."): t for n, t in stored.items() if n.startswith(linear + ".weight")}
        if scheme.input_activations is not None and local["weight_scale"].dtype.itemsize > 1:
            local["weight_scale"] = local["weight_scale"].float()
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        found[f"{linear}.weight"] = compressor.decompress(local, scheme)["weight"]
    return found


def scheme_of(artifact: Artifact, linear: str) -> QuantizationScheme:
    """What the config says of one quantised linear, as the compressed-tensors package reads it."""
    groups = read_json(artifact.path / "config.json")["quantization_config"]["config_groups"].values()
    (group,) = [g for g in groups if any(t == "Linear" or re.match(t[3:], linear) for t in g["targets"])]
    wanted = {key: group[key] for key in ("weights", "input_activations", "format")}
    return QuantizationScheme(targets=["Linear"], **wanted)


def round_inputs_too(model: torch.nn.Module, artifact: Artifact) -> None:
    """Makes the linears of a dense model round their inputs as the package does for this artifact."""
    stored = tensors(artifact.path)
    linears = {name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")}
    for name in linears:
        args = scheme_of(artifact, name).input_activations
        if args is None:
            continue
        static, multiplier = (stored.get(name + part) for part in INPUT_PARTS)
        assert (static is None) == bool(args.dynamic)
        assert (multiplier is None) == (args.dynamic != "local")
        modules = dict(model.named_modules())
        module = modules[name if name in modules else f"{model.base_model_prefix}.{name}"]

        def hook(
            module: torch.nn.Module,
            given: tuple[Tensor, ...],
            args: Any = args,
            static: Any = static,
            multiplier: Any = multiplier,
        ) -> Any:
            # The package takes one scale for all tokens of a matrix, for a token is a place in (batch, sequence) to it.
            x, zero = given[0].reshape(-1, 1, given[0].shape[-1]), None
            scale = static if static is None else static.to(x.dtype)
            if scale is None:
                scale, zero = compute_dynamic_scales_and_zp(x, args, module, multiplier)
            return (fake_quantize(x, scale, zero, args, multiplier).reshape(given[0].shape), *given[1:])

        module.register_forward_pre_hook(hook)


def dense_model(source: Path, state: dict[str, Tensor], dtype: torch.dtype) -> torch.nn.Module:
    """The source's architecture with these weights, by the names of the checkpoint; every key must find its place."""
    config = AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        cls = type(AutoModelForCausalLM.from_config(config))
    model, info = cls.from_pretrained(None, config=config, state_dict=state, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Logits (batch, seq, vocabulary) of a transformers model."""
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits


def source_logits(source: Path, tokens: Tensor) -> Tensor:
    """Logits of the unquantised model."""
    return logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval(), tokens)


def fake_quantized_logits(
    source: Path, artifact: Artifact, tokens: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Logits of the source's model with the values that the artifact stands for."""
    state = decoded(artifact)
    if artifact.config["model_type"] == "gpt2":  # Conv1D keeps (in, out); packed weights are (out, in)
        matrices = block_matrices(tensors(source))
        state = {name: t.T.contiguous() if name in matrices else t for name, t in state.items()}
    model = dense_model(source, state, dtype)
    round_inputs_too(model, artifact)
    return logits(model, tokens)


def loaded_logits(path: Path, tokens: Tensor, **options: Any) -> Tensor:
    """Logits of a directory as transformers itself loads it; no key may be missing or left over."""
    model, info = AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, local_files_only=True, **{"dtype": torch.float32, **options}
    )
    assert not any(info.values()), info
    return logits(model.eval(), tokens)


def copy_with(source: Path, target: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """A copy of a model directory of one shard whose tensors `change` maps to others."""
    shutil.copytree(source, target)
    save_file(change(load_file(source / "model.safetensors")), target / "model.safetensors", {"format": "pt"})
    return target


def a_little_off(source: Path, target: Path) -> Path:
    """A copy of a model directory whose block matrices differ by noise of 0.3 of their standard deviation."""

    def off(state: dict[str, Tensor]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        inside = block_matrices(state)
        return {
            n: t + 0.3 * t.std() * torch.randn(t.shape, generator=generator) if n in inside else t
            for n, t in sorted(state.items())
        }

    return copy_with(source, target, off)


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference as a share of the expected norm."""
    return float((found - expected).norm() / expected.norm())


def tensor_hashes(artifact: Artifact) -> dict[str, str]:
    """SHA-256 of every output tensor, as the manifest has it."""
    return {name: record.sha256 for name, record in artifact.manifest.tensors.items()}


def failing_at(label: str, error: BaseException | None = None) -> Callable[[str], None]:
    """A `durable.step` at which writing fails as it does on a full disk, or as `error` says."""

    def step(reached: str) -> None:
        if reached == label:
            raise error or WorkError("the disk is full", "free some space")

    return step


def snapshot(root: Path) -> dict[str, str]:
    """Every path under `root`, hidden ones too, with the hash of its bytes; two are equal if nothing was touched."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
        for path in sorted(root.rglob("*"))
    }

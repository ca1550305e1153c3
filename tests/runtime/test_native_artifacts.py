"""The native back end and what artifacts hold: every scheme, rounded inputs, damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress import pipeline
from compress.errors import CompressError, IntegrityError
from compress.models.checkpoint import Checkpoint
from compress.runtime import loading, transformers_backend
from compress.schemes import FIXED_SCHEMES
from compress.types import InputScheme, IntScheme
from tests.pipeline import harness
from tests.runtime.native import GREEDY, divergence, native
from tests.runtime.packed import fitting, write_packed
from tests.tiny_models import tiny_tokens


def fixed(name: str, tiny: Callable[..., Path], tmp_path: Path, model_type: str = "llama", **settings: Any) -> Path:
    """A tiny model in one of the schemes that a name says all of, as the pipeline makes it."""
    source = tiny(model_type, hidden_size=128, intermediate_size=256, num_attention_heads=8, num_key_value_heads=4)
    method = "ternary" if name == "W2A8" else "rtn"
    wanted = harness.recipe(method, harness.write_text(tmp_path / "text.txt"), scheme=name, **settings)
    return pipeline.run(wanted, model=source, output=tmp_path / f"{model_type}-{name}").artifact.path


KINDS = {name: name.lower() for name in ("FP8", "NVFP4", "MXFP4", "MXFP8", "NF4")} | {"W8A8": "int8", "W2A8": "int2"}


@pytest.mark.parametrize("name", FIXED_SCHEMES)
def test_schemes_that_a_name_says_all_of(name: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = fixed(name, tiny, tmp_path, "mistral" if name == "W2A8" else "llama")  # bitnet knows no biases
    runtime, tokens = native(path), tiny_tokens(2, 20)
    expected, found = transformers_backend.load(path, device="cpu").score(tokens), runtime.score(tokens)
    (kind,) = (kernel for prefix, kernel in KINDS.items() if name.startswith(prefix))
    weights, _, *rounded = next(use.kernel for use in runtime.layers() if "up_proj" in use.name).split()[1:]
    assert weights == kind
    assert (len(rounded) == 3) == (FIXED_SCHEMES[name].inputs is not None)
    if FIXED_SCHEMES[name].inputs is None:
        assert torch.allclose(found, expected, atol=2e-5, rtol=1e-4)
    else:  # a sum's last bit may turn a code that lies on an edge
        assert divergence(found, expected) < 2e-3
        assert (found - expected).abs().amax(-1).min() < 1e-4
    answers = [[answer.token_ids for answer in runtime.generate(tokens.tolist(), GREEDY)]]
    answers += [[runtime.generate([row], GREEDY)[0].token_ids for row in tokens.tolist()]]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("name", "damaged"),
    [("W8A8", torch.nan), ("FP8_BLOCK", torch.inf), ("FP8_DYNAMIC", 2.0**96), ("NVFP4A16", 0xFF), ("MXFP4A16", 255)],
)
def test_scales_that_are_no_numbers_are_refused(
    name: str, damaged: float, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    path = fixed(name, tiny, tmp_path)
    tensors = load_file(path / "model.safetensors")
    scale = tensors["model.layers.1.mlp.up_proj.weight_scale"]
    (scale if scale.dtype.itemsize > 1 else scale.view(torch.uint8)).view(-1)[-1] = damaged
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError, match=r"1.mlp.up_proj.weight_scale holds NaN"):
        loading.load(path, device="cpu", kernel="cpu")


@pytest.mark.parametrize("name", ["FP8_STATIC", "FP8_DYNAMIC", "NVFP4A16"])
def test_modelopt_checkpoints(name: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = fixed(name, tiny, tmp_path, format="modelopt")
    file = path / "model.safetensors"
    tensors = load_file(file)
    for part, tensor in tensors.items():
        if part.endswith("weight_scale_2"):  # as theirs are: no power of two
            tensors[part] = tensor * 1.37
    save_file(tensors, file, {"format": "pt"})
    tokens = tiny_tokens(2, 20)
    expected, found = transformers_backend.load(path, device="cpu").score(tokens), native(path).score(tokens)
    assert (found - expected).abs().amax(-1).min() < 1e-4
    assert divergence(found, expected) < (1e-9 if name == "NVFP4A16" else 2e-3)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("qwen3_moe", "MXFP8A16"), ("mixtral", "MXFP4A16"), ("phi3", "NVFP4"), ("phi3", "FP8_STATIC")],
)
def test_floats_in_experts_and_stacked_matrices(
    model_type: str, name: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    path = fixed(name, tiny, tmp_path, model_type)
    runtime, tokens = native(path), tiny_tokens(1, 12)
    whole = runtime.score(tokens)
    assert torch.isfinite(whole).all()
    expected = transformers_backend.load(path, device="cpu").score(tokens)
    assert (whole - expected).abs().amax(-1).min() < 1e-4
    alone = runtime.model
    with alone.pages.lend(12) as pages:
        rows = [alone.sequence([token], at, pages, [0]) for at, token in enumerate(tokens[0].tolist())]
    assert torch.equal(torch.cat(rows), whole[0])


def test_weights_that_are_no_numbers_are_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = fixed("FP8_DYNAMIC", tiny, tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].view(torch.uint8)[5, 9] = 0x7F
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError, match=r"up_proj.*NaN"):
        native(path)


W8A8 = IntScheme(8, None, inputs=InputScheme("int", "token"))


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
@pytest.mark.parametrize("where", ["", "down_proj"])
def test_inputs_are_rounded_as_the_format_says(
    model_type: str, where: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    packed, dense = write_packed(tiny(model_type), tmp_path, lambda spec: W8A8 if where in spec.name else None)
    tokens = tiny_tokens(2, 20)
    expected, weights_alone = (transformers_backend.load(path, device="cpu").score(tokens) for path in (packed, dense))
    exact, eight_bit = (native(packed, kernel) for kernel in ("cpu", "cpu-int8"))
    noise = divergence(weights_alone, expected)
    assert noise > 1e-9
    found = exact.score(tokens)
    assert divergence(found, expected) < 0.2 * noise  # a sum's last bit may turn a code that lies on an edge
    assert (found - expected).abs().amax(-1).min() < 1e-4 * (weights_alone - expected).abs().max() + 1e-5
    assert divergence(eight_bit.score(tokens), expected) < noise
    kernels = {use.kernel for use in eight_bit.layers() if use.name.endswith("down_proj")}
    assert all(kernel.endswith("int8 x int8") for kernel in kernels)


def test_inputs_of_experts_are_rounded_too(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """transformers keeps experts fused and rounds nothing, so the two kernels, which both round, are compared."""
    packed, dense = write_packed(tiny("qwen3_moe"), tmp_path, lambda spec: W8A8 if "experts" in spec.name else None)
    tokens = tiny_tokens(2, 20)
    ways = [[native(path, kernel).score(tokens) for kernel in ("cpu", "cpu-int8")] for path in (packed, dense)]
    of_head = divergence(ways[1][1], ways[1][0])  # the head alone is in 8 bits there
    assert divergence(ways[0][1], ways[0][0]) < 3 * of_head
    assert divergence(ways[1][0], ways[0][0]) > 1e-6


def test_linears_of_one_input_that_round_it_differently_stay_with_transformers(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    packed, dense = write_packed(
        tiny("llama"), tmp_path, lambda spec: W8A8 if spec.name.endswith("1.mlp.up_proj") else IntScheme(4, 32)
    )
    assert "do not round them alike" in loading.decide(Checkpoint.open(packed), "cpu").reason
    tokens = tiny_tokens(2, 20)
    found, weights_alone = (loading.load(path, device="cpu").score(tokens) for path in (packed, dense))
    assert loading.load(packed, device="cpu").name == "transformers+native"
    expected = transformers_backend.load(packed, device="cpu").score(tokens)
    assert divergence(found, expected) < 0.2 * divergence(weights_alone, expected)
    assert 1e-9 < divergence(found, weights_alone) < 1e-2


def _remove(name: str) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def damage(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        del tensors[name]

    return damage


def _shorten(name: str) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, _: tensors.update({name: tensors[name][:-1].clone()})


def _lie(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight_shape"] = torch.tensor([2**40, 2**40])


def _other_bits(_: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 3


@pytest.mark.parametrize(
    "damage",
    [
        _remove("model.layers.1.mlp.up_proj.weight_scale"),
        _remove("model.norm.weight"),
        _shorten("model.layers.0.self_attn.q_proj.weight_packed"),
        _shorten("model.layers.0.self_attn.q_proj.weight_scale"),
        _shorten("model.embed_tokens.weight"),
        _lie,
        _other_bits,
    ],
)
def test_damaged_artifacts_are_refused(
    damage: Callable[[dict[str, Tensor], dict[str, Any]], None], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    packed, _ = write_packed(tiny("llama"), tmp_path, fitting(4, 32))
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    tensors, config = load_file(copy / "model.safetensors"), json.loads((copy / "config.json").read_text())
    damage(tensors, config)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompressError):
        loading.load(copy, device="cpu")
